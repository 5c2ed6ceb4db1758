"""The funnel: rows in, dropped by reason, and out, of every stage of a run."""

from dataclasses import dataclass

from pipelines.run.run_record import RunRecord, StageEntry


@dataclass(frozen=True)
class FunnelRow:
    """One stage of one flow."""

    flow: str
    stage: str
    rows_in: int
    added: int
    """Rows of sets taken as they are that join here."""
    dropped: dict[str, int]
    rows_out: int

    @property
    def num_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(self.dropped.values())

    @property
    def reasons(self) -> str:
        """The reasons, each with its rows."""
        return ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items())


def funnel(record: RunRecord) -> list[FunnelRow]:
    """Rows of the pool's stages, in order; each one's rows in are the last one's rows out."""
    rows: list[FunnelRow] = []
    before: int | None = None
    for entry in record.pool:
        rows.append(_row("pool", entry, before))
        before = entry.record.rows_out
    return rows


def set_funnels(record: RunRecord) -> dict[str, list[FunnelRow]]:
    """The same for each benchmark and seed set."""
    return {
        name: [_row(name, entry, None) for entry in entries]
        for name, entries in record.sets.items()
    }


def adds_up(rows: list[FunnelRow]) -> bool:
    """Whether rows in + added = dropped + rows out, at every stage."""
    return all(row.rows_in + row.added == row.num_dropped + row.rows_out for row in rows)


def _row(flow: str, entry: StageEntry, before: int | None) -> FunnelRow:
    done = entry.record
    rows_in = done.rows_in if before is None else before
    added = done.rows_in - rows_in
    return FunnelRow(flow, entry.stage, rows_in, added, done.dropped, done.rows_out)
