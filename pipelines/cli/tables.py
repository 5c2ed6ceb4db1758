"""Prints what commands found, as tables for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.audit.funnel import FunnelRow, funnel
from pipelines.audit.tables import Row
from pipelines.operate import console

if TYPE_CHECKING:
    from pipelines.audit.verify_dataset import Checked, ShardProof
    from pipelines.operate.hardware import ClusterSpec
    from pipelines.operate.planner import StagePlan
    from pipelines.operate.status import Status
    from pipelines.run.preflight import Preflight
    from pipelines.run.run_record import RunRecord
    from pipelines.run.whole_run import FinishedRun

_STATUS_COLUMNS = (
    *("stage", "rows_in", "seconds", "rows_per_s", "bytes_per_s", "busy_share", "wait_s"),
    *("retries", "peak_bytes"),
)
_SOMETIMES = ("device_busy_share", "planned_s")
_SHOWN_QUANTILES = ("0.01", "0.5", "0.99")
_HIDDEN = ("stage", "keep", "reason", "score", "threshold")


def print_verification(path: str, checked: "Sequence[Checked]", *, as_json: bool) -> None:
    """Print what was looked at, and every defect."""
    defects = [f"{one.where}: {defect}" for one in checked for defect in one.defects]
    if as_json:
        looked_at = [vars(one) for one in checked]
        console.print_json(
            {"path": path, "ok": not defects, "defects": defects, "checked": looked_at}
        )
        return
    rows = []
    for one in checked:
        verdict = f"{len(one.defects)} defects" if one.defects else "; ".join(one.notes) or "ok"
        rows.append((one.where, one.files, one.rows, one.num_bytes, verdict))
    console.print_rows(("checked", "files", "rows", "bytes", "verdict"), rows)
    for defect in defects:
        console.print_line(f"DEFECT {defect}")
    console.print_line(f"{len(defects)} defects" if defects else "everything is as it was written")


def print_proof(path: str, proof: "ShardProof", *, as_json: bool) -> None:
    """Print the path of hashes from one shard to the digest of its data set."""
    if as_json:
        console.print_json({"path": path, "ok": not proof.defects, **vars(proof)})
        return
    console.print_pairs(
        {
            "shard": f"{proof.shard}, number {proof.number} of {proof.shards}",
            "files": proof.leaf,
            "hashed with": proof.path,
            "files digest": proof.files_digest,
        },
        title="proof",
    )
    for defect in proof.defects:
        console.print_line(f"DEFECT {path}: {defect}")


def print_diff(found: Row) -> None:
    """Print what differs between two builds."""
    print_table(found["settings"], "settings that differ")
    print_table(found["versions"], "versions that differ")
    print_table(found["stages"], "rows dropped")
    for name, title in (("left", "images that left"), ("came", "images that came")):
        rows = [{**row, "examples": ", ".join(row["examples"])} for row in found[name]]
        print_table(rows, f"{title}, by what the other build did with them")
    console.print_line(
        f"{found['stayed']:,} images are in both, {found['changed']:,} of them with other figures"
    )
    if found["same"]:
        console.print_line("the two sets have the same content")


def print_run(found: Row) -> None:
    """Print the figures of a run."""
    rows = [FunnelRow(**row) for row in found["funnel"]]
    console.print_funnel(rows, title=f"{found['recipe']}: rows through each stage")
    _print_scores(found["scores"])
    print_table(found["fetches"], "downloads")
    print_table(found["duplicates"], "near duplicates by size of component")
    print_table(found["seed_sets"], "retrieval by seed set")
    print_table(found["parts"], "parts of the set")
    print_table(found["failed_shards"], "shards that failed")
    print_table(found["hosts"], "hosts")
    print_table(found["languages"], "languages of alternative texts")
    if found["images"]:
        print_table(found["images"]["formats"], "formats of the pool's images")
        _print_columns(found["images"]["sides"], "sizes of the pool's images")
    if found["manifest"]:
        print_dataset(found["manifest"])


def print_dataset(found: Row) -> None:
    """Print the figures of a data set."""
    names = ("path", "rows", "bytes", "shards", "content_digest")
    console.print_pairs({n: found[n] for n in names if found[n] is not None}, title="data set")
    _print_columns(found["columns"], "columns")
    for column in found["columns"]:
        if column.get("values"):
            print_table(column["values"], column["column"])
    print_table(found.get("balance", []), "balance: entropy 1 and Gini 0 where all are equal")
    if found.get("hosts"):
        print_table(found["hosts"], "hosts")
    print_table(found.get("languages", []), "languages of alternative texts")


def _print_scores(scores: Sequence[Row]) -> None:
    if scores:
        console.print_rows(
            ("score", "rows", *_SHOWN_QUANTILES, "thresholds"),
            [
                (
                    f"{score['stage']}: {score['score']}",
                    score["rows"],
                    *(_number(score["quantiles"][q]) for q in _SHOWN_QUANTILES),
                    ", ".join(_number(value) for value in score["thresholds"]),
                )
                for score in scores
            ],
            title="scores: quantiles, and what they are judged by",
        )


def _print_columns(columns: Sequence[Row], title: str) -> None:
    console.print_rows(
        ("column", "values", "min", "median", "max"),
        [
            (
                one["column"],
                one.get("rows", ""),
                _number(one.get("min")),
                _number((one.get("quantiles") or {}).get("0.5")),
                _number(one.get("max")),
            )
            for one in columns
        ],
        title=title,
    )


def print_table(rows: Sequence[Row], title: str) -> None:
    """Rows that all have the same keys."""
    if rows:
        values = [[plain(value) for value in row.values()] for row in rows]
        console.print_rows(tuple(rows[0]), values, title=title)


def print_life(life: Row) -> None:
    """Print what became of one image."""
    origin = life["origin"] or {}
    pairs = {"id": life["id"], "flow": life["flow"], "fate": life["fate"]}
    pairs |= _known(origin)
    for part in ("fetch", "image"):
        pairs |= {f"{part}: {k}": v for k, v in _known(life[part] or {}).items()}
    console.print_pairs(pairs, title="image")
    console.print_rows(
        ("stage", "verdict", "reason", "score", "threshold", "more"),
        [_verdict_row(row) for row in life["verdicts"]],
        title="verdicts",
    )
    if life["sources"]:
        console.print_pairs(life["sources"], title="images named above")
    own = "id" if life["flow"] == "pool" else "seed_id"
    print_table([{k: v for k, v in hit.items() if k != own} for hit in life["hits"]], "hits")
    for part in ("manifest", "packed"):
        if life.get(part):
            console.print_pairs(_known(life[part]), title=part)


def print_seen(found: Row) -> None:
    """Print what a run holds of a photo that may never have been listed."""
    shown = {name: plain(value) for name, value in found.items() if not isinstance(value, list)}
    console.print_pairs(shown, title="photo")
    print_table(found["verdicts"], "what the run's filters say of it")
    print_table(found["equal"], "equal images in the run")
    print_table(found["nearest"], "nearest images of the set")
    print_table(found["nearest_benchmark"], "nearest benchmark images")


def _known(values: Row) -> Row:
    return {k: v for k, v in values.items() if v is not None and k != "id"}


def _verdict_row(row: Row) -> tuple[str, ...]:
    more = ", ".join(f"{k} {plain(v)}" for k, v in row.items() if k not in _HIDDEN)
    return (
        row["stage"],
        "keep" if row["keep"] else "DROP",
        row["reason"] or "",
        _number(row["score"]),
        _number(row["threshold"]),
        more,
    )


def _number(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def plain(value: object) -> object:
    """A value as a cell of a table shows it."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else _number(value) if isinstance(value, float) else value


def print_truth(found: Row) -> None:
    """Print how many known edits are found, and what other thresholds would find."""
    own = found["threshold"]
    console.print_rows(
        ("edit", "found", "95 %", "least alike", "median"),
        [
            (
                one["edit"],
                f"{one['recall']:.1%}",
                f"{one['recall_low']:.1%} to {one['recall_high']:.1%}",
                f"{one['lowest']:.4f}",
                f"{one['median']:.4f}",
            )
            for one in found["edits"]
        ],
        title=f"known edits of {found['images']} images, found above {own:g} ({found['encoder']})",
    )
    console.print_rows(
        ("threshold", "edits found", "precision", "innocents above"),
        [
            (f"{p['threshold']:g}", *(f"{p[n]:.2%}" for n in ("recall", "precision", "innocents")))
            for p in found["curve"]
            if p["threshold"] == own or round(p["threshold"] * 20, 6).is_integer()
        ],
        title="what another threshold would find",
    )


def summary_of(done: "FinishedRun", work: str, seconds: float) -> Row:
    """What became of a run, for machines. work: its folder; seconds: what all took."""
    from curation import storage
    from pipelines.run.demo_marks import mark
    from pipelines.run.whole_run import manifest_digest

    record, steps = done.record, {name: step.result for name, step in done.steps.items()}
    truth = Path(work) / "site" / "truth.parquet"
    paths = {"manifest": record.manifest, "packed": record.packed}
    return {
        "recipe": record.recipe,
        "worked": done.worked,
        "seconds": seconds,
        "funnel": [vars(row) for row in funnel(record)],
        "empty": next((one.stage for one in record.pool if not one.record.rows_out), None),
        "content_digest": manifest_digest(record, work),
        **{name: path and storage.join(work, path) for name, path in paths.items()},
        "report": steps["report"]["page"],
        "pretrain": steps.get("pretrain"),
        "evaluate": steps.get("evaluate"),
        "marks": mark(record, work, truth) if truth.exists() else None,
    }


def print_finished_run(record: "RunRecord", summary: Row) -> None:
    """Print what became of a run."""
    console.print_funnel(funnel(record), title=f"{record.recipe}: rows through each stage")
    if summary["marks"] is not None:
        console.print_marks(summary["marks"])
    lines = {
        "manifest": summary["manifest"],
        "content digest": summary["content_digest"],
        "packed shards": summary["packed"],
        "report": summary["report"],
        "checkpoint": (summary["pretrain"] or {}).get("backbone"),
        "k-NN": (summary["evaluate"] or {}).get("text"),
    }
    console.print_pairs({name: value for name, value in lines.items() if value}, title="")
    if summary["empty"]:
        console.print_line(f"no image is left: {summary['empty']} dropped the last of them")
    said = "done" if summary["worked"] else "nothing to do: everything was finished before"
    console.print_line(f"{said}, in {summary['seconds']:.1f} s")


def print_preflight(recipe: str, found: "Preflight") -> None:
    """Print what is the same everywhere, and what differs."""
    if not found.refusals:
        same = next(iter(found.nodes.values())).facts
        differing = {one.what for one in found.differences}
        alike = [(what, value) for what, value in same.items() if what not in differing]
        console.print_rows(("on every node", ""), alike, title=", ".join(found.nodes))
    for line in found.warnings:
        console.print_line(f"differs: {line}")
    for line in found.refusals:
        console.print_line(f"REFUSED {line}")
    if not found.refusals:
        console.print_line(f"{recipe}: may run on {len(found.nodes) - 1} nodes or workers")


def print_plan(plan: Row, stages: "Sequence[StagePlan]", cluster: "ClusterSpec | None") -> None:
    """Print what each stage of a recipe will take, and all of them."""
    titles = (
        *("stage", "rows", "hours", "±", "core-hours", "GPU-hours"),
        *("peak GB", "disk GB", "network GB", "by"),
    )
    console.print_rows(
        titles,
        [
            (
                one.stage,
                f"{one.rows:,.0f}",
                f"{one.wall_s / 3600:,.2f}",
                f"{one.uncertainty:.0%}",
                f"{one.core_hours:,.2f}",
                f"{one.gpu_hours:,.2f}",
                f"{one.peak_bytes / 1e9:.2f}",
                f"{one.disk_bytes / 1e9:,.2f}",
                f"{one.network_bytes / 1e9:,.2f}",
                one.limited_by,
            )
            for one in stages
        ],
        f"{plan['images']:,.0f} rows, measured on this machine",
    )
    machines = "this machine, with one worker"
    if cluster is not None:
        machines = f"{cluster.nodes:,} nodes, {cluster.cores:,} cores, {cluster.devices:,} GPUs"
    low, high = plan["wall_low_s"] / 3600, plan["wall_high_s"] / 3600
    console.print_pairs(
        {
            "hours": f"{plan['wall_s'] / 3600:,.2f} ({low:,.2f} to {high:,.2f})",
            "on": machines,
            "core-hours": f"{plan['core_hours']:,.1f}",
            "GPU-hours": f"{plan['gpu_hours']:,.1f}",
            "disk left": f"{plan['disk_bytes'] / 1e9:,.1f} GB",
            "network": f"{plan['network_bytes'] / 1e9:,.1f} GB",
            "bottleneck": f"{plan['bottleneck']}, limited by {plan['limited_by']}",
        },
        title="",
    )


def print_status(work: str, found: "Status") -> None:
    """Print what a run is doing, or did last."""
    stages = found.finished_stages()
    if stages:
        known = {name for stage in stages for name in stage}
        shown = (*_STATUS_COLUMNS, *(name for name in _SOMETIMES if name in known))
        console.print_rows(shown, [[stage.get(name, "") for name in shown] for stage in stages])
    pairs: Row = {"state": found.state, "recipe": found.recipe}
    if found.stage:
        shards = f"{found.done}/{found.total} shards" if found.total else ""
        pairs |= {"stage": f"{found.stage} {shards}".strip(), "step": found.step}
        pairs["rows/s"] = found.rows_per_s
    pairs["time left"] = None if found.left_s is None else f"{found.left_s:,.0f} s"
    pairs["times the plan so far"] = found.times_planned
    pairs |= {"seconds": found.seconds, "error": found.error}
    pairs["damaged lines of events left out"] = found.unreadable_events or None
    pairs["last heard of"] = f"{found.silent_s:,.0f} s ago"
    told = {name: value for name, value in pairs.items() if value not in (None, "")}
    console.print_pairs(told, title=work)
