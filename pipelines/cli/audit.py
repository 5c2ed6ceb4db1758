"""What auditors ask: `curate stats`, `sql`, `explain`, `report`, `verify` and their like."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from curation import storage
from curation.errors import DatasetError
from curation.lock import locked
from pipelines.audit.seal import broken_seals
from pipelines.audit.work_folder import WorkFolder
from pipelines.operate import console

if TYPE_CHECKING:
    from curation.stage import Engine

Row = dict[str, Any]

P = ParamSpec("P")
R = TypeVar("R")

_SHOWN_QUANTILES = ("0.01", "0.5", "0.99")
_HIDDEN = ("stage", "keep", "reason", "score", "threshold")


def names_damage(verb: Callable[P, R]) -> Callable[P, R]:
    """Where a verb stumbles over a run that is not what was sealed, say that in one line."""

    @functools.wraps(verb)
    def asked(*args: P.args, **options: P.kwargs) -> R:
        try:
            return verb(*args, **options)
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            for work in (one for one in args if isinstance(one, str) and WorkFolder.is_one(one)):
                broken = broken_seals(work, WorkFolder(work).record)
                if broken:
                    raise DatasetError(
                        f"{work}: cannot be read: {broken[0]}; `curate verify` names all damage"
                    ) from error
            raise

    return asked


@names_damage
def print_stats(path: str, as_json: bool, by: str | None = None, csv: str | None = None) -> None:
    """`curate stats`."""
    from pipelines.audit.stats import count_by_column, stats_of, write_csv

    if by is not None:
        rows = count_by_column(path, by)
        found: Any = {"path": path, "by": by, "values": rows}
    else:
        found = stats_of(path)
    if csv is not None:
        console.print_line(write_csv(found, csv))
    elif as_json:
        console.print_json(found)
    elif by is not None:
        _print_table(found["values"], f"{path} by {by}")
    elif found["kind"] == "run":
        _print_run(found)
    else:
        _print_dataset(found)


@names_damage
def print_answer(
    work: str, query: str | None, limit: int, as_json: bool, *, allow_files: bool = False
) -> None:
    """`curate sql`."""
    from pipelines.audit.sql import ask, views_of

    if query is None:
        views = views_of(work)
        if as_json:
            console.print_json(views)
        else:
            console.print_pairs({n: ", ".join(c) for n, c in views.items()}, title="views")
        return
    answer = ask(work, query, limit, allow_files=allow_files)
    if as_json:
        console.print_json(answer.rows)
        return
    _print_table(answer.rows, "")
    if answer.more:
        console.print_line(f"the first {limit} rows; --limit shows more")


@names_damage
def print_explanation(image: str, work: str, as_json: bool) -> None:
    """`curate explain`."""
    from pipelines.audit.explain import explain

    if Path(image).is_file():
        _print_file(image, work, as_json)
        return
    lives = explain(image, work)
    if as_json:
        console.print_json(lives)
        return
    for life in lives:
        _print_life(life)


@names_damage
def write_report(work: str, out: str | None) -> None:
    """`curate report`."""
    from pipelines.audit.seal import REPORT, seal_again
    from pipelines.web.report.page import write_page

    page = storage.join(work, REPORT)
    if out not in (None, page):
        console.print_line(write_page(work, str(out)))
        return
    with locked(work):
        console.print_line(write_page(work, page))
        seal_again(work, REPORT)


@names_damage
def serve(
    work: str, host: str, port: int, catalog: str | None, allowed: Sequence[str] = ()
) -> None:
    """`curate serve`."""
    from pipelines.web.serving.catalog_file import catalog_of

    server = server_module("serve")
    work = work.rstrip("/")
    names = server.names_of(host, allowed)
    file = catalog_of(work, catalog)
    with server.listening(host, port) as listener:
        shown, chosen = listener.getsockname()[:2]
        console.print_line(f"{work}: http://{shown}:{chosen} (Ctrl-C ends it)")
        server.serve(server.make_app(work, file, names), listener)


def server_module(verb: str) -> Any:
    """The module of the server.

    Raises:
        ConfigError: it needs packages that are not installed.
    """
    from curation.errors import ConfigError

    try:
        from pipelines.web.serving import app
    except ImportError as error:
        raise ConfigError(
            f"curate {verb}: {error.name} is missing; pip install 'lvd-curate[serve]'"
        ) from error
    return app


def print_verification(path: str, as_json: bool) -> bool:
    """`curate verify`: whether everything is as it was written."""
    from pipelines.audit.verify import verify

    checked = verify(path)
    defects = [f"{one.where}: {defect}" for one in checked for defect in one.defects]
    if as_json:
        console.print_json(
            {
                "path": path,
                "ok": not defects,
                "defects": defects,
                "checked": [vars(c) for c in checked],
            }
        )
        return not defects
    console.print_rows(
        ("checked", "files", "rows", "bytes", "verdict"),
        [(one.where, one.files, one.rows, one.num_bytes, _verdict(one)) for one in checked],
    )
    for defect in defects:
        console.print_line(f"DEFECT {defect}")
    console.print_line(f"{len(defects)} defects" if defects else "everything is as it was written")
    return not defects


def print_proof(path: str, shard: str, as_json: bool) -> bool:
    """`curate verify --shard`: whether one shard is what its data set says."""
    from pipelines.audit.verify_dataset import prove_shard

    proof = prove_shard(path.rstrip("/"), shard)
    if as_json:
        console.print_json({"path": path, "ok": not proof.defects, **vars(proof)})
        return not proof.defects
    pairs: Row = {"shard": f"{proof.shard}, number {proof.number} of {proof.shards}"}
    pairs |= {"files": proof.leaf, "hashed with": proof.path}
    console.print_pairs(pairs | {"files digest": proof.files_digest}, title="proof")
    for defect in proof.defects:
        console.print_line(f"DEFECT {path}: {defect}")
    return not proof.defects


@names_damage
def print_diff(old: str, new: str, as_json: bool) -> None:
    """`curate diff`."""
    from pipelines.audit.diff import diff

    found = diff(old, new)
    if as_json:
        console.print_json(found)
        return
    _print_table(found["settings"], "settings that differ")
    _print_table(found["versions"], "versions that differ")
    _print_table(found["stages"], "rows dropped")
    for name, title in (("left", "images that left"), ("came", "images that came")):
        rows = [{**row, "examples": ", ".join(row["examples"])} for row in found[name]]
        _print_table(rows, f"{title}, by what the other build did with them")
    console.print_line(
        f"{found['stayed']:,} images are in both, {found['changed']:,} of them with other figures"
    )
    if found["same"]:
        console.print_line("the two sets have the same content")


def print_certificate(
    work: str, out: str | None, how: dict[str, Any], engine: "Engine", as_json: bool
) -> bool:
    """`curate certificate`: whether no benchmark image has an image of the set near it.

    how: threshold, encoder and scratch, see `certify`.
    """
    from pipelines.audit.certificate import certify, markdown

    found = certify(work, engine, **how)
    if out is not None:
        storage.write_bytes(out, markdown(found).encode())
    if as_json:
        console.print_json(found)
    else:
        names = ("benchmark", "images", "above", "nearest", "median")
        console.print_rows(
            names, [[_plain(one[name]) for name in names] for one in found["benchmarks"]]
        )
        for one in found["benchmarks"]:
            console.print_line(one["statement"])
    return not any(one["above"] for one in found["benchmarks"])


@names_damage
def write_card(work: str, out: str) -> None:
    """`curate card`."""
    from pipelines.audit.card import write_card as write

    for path in write(work, out):
        console.print_line(path)


def forget_images(work: str, lists: dict[str, str | None], near: bool, as_json: bool) -> None:
    """`curate forget`."""
    from curation.errors import ConfigError
    from pipelines.audit.forget import forget

    given = [(kind, path) for kind, path in lists.items() if path is not None]
    if len(given) != 1:
        raise ConfigError("curate forget: give one of --ids, --urls and --hashes")
    kind, path = given[0]
    names = storage.read_bytes(path).decode("utf-8", "replace").splitlines()
    done = forget(work, kind, names, near=near)  # type: ignore[arg-type]  # the keys above
    if as_json:
        console.print_json(vars(done))
        return
    _print_table([{k: r[k] for k in ("flow", "id", "sha256")} for r in done.rows], "forgotten")
    for text in done.not_found:
        console.print_line(f"never seen: {text}")
    for checkpoint in done.checkpoints:
        console.print_line(f"may have seen them: {checkpoint}")
    if done.rows:
        console.print_line(f"content digest now {done.content_digest}")
        folder = done.tombstones[0].rpartition("/")[0]
        console.print_line(
            f"later runs here or with this --base keep them out, others by 'forgotten: [{folder}]'"
        )


def _verdict(one: Any) -> str:
    if one.defects:
        return f"{len(one.defects)} defects"
    return "; ".join(one.notes) or "ok"


def _print_run(found: Row) -> None:
    from pipelines.audit.funnel import FunnelRow

    rows = [FunnelRow(**row) for row in found["funnel"]]
    console.print_funnel(rows, title=f"{found['recipe']}: rows through each stage")
    _print_scores(found["scores"])
    _print_table(found["fetches"], "downloads")
    _print_table(found["duplicates"], "near duplicates by size of component")
    _print_table(found["seed_sets"], "retrieval by seed set")
    _print_table(found["parts"], "parts of the set")
    _print_table(found["failed_shards"], "shards that failed")
    _print_table(found["hosts"], "hosts")
    _print_table(found["languages"], "languages of alternative texts")
    if found["images"]:
        _print_table(found["images"]["formats"], "formats of the pool's images")
        _print_columns(found["images"]["sides"], "sizes of the pool's images")
    if found["manifest"]:
        _print_dataset(found["manifest"])


def _print_dataset(found: Row) -> None:
    names = ("path", "rows", "bytes", "shards", "content_digest")
    console.print_pairs({n: found[n] for n in names if found[n] is not None}, title="data set")
    _print_columns(found["columns"], "columns")
    for column in found["columns"]:
        if column.get("values"):
            _print_table(column["values"], column["column"])
    _print_table(found.get("balance", []), "balance: entropy 1 and Gini 0 where all are equal")
    if found.get("hosts"):
        _print_table(found["hosts"], "hosts")
    _print_table(found.get("languages", []), "languages of alternative texts")


def _print_scores(scores: list[Row]) -> None:
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


def _print_columns(columns: list[Row], title: str) -> None:
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


def _print_table(rows: list[Row], title: str) -> None:
    """Rows that all have the same keys."""
    if rows:
        values = [[_plain(value) for value in row.values()] for row in rows]
        console.print_rows(tuple(rows[0]), values, title=title)


def _print_life(life: Row) -> None:
    origin = life["origin"] or {}
    pairs = {"id": life["id"], "flow": life["flow"], "fate": life["fate"]}
    pairs |= {k: v for k, v in origin.items() if v is not None and k != "id"}
    for part in ("fetch", "image"):
        pairs |= {f"{part}: {k}": v for k, v in (life[part] or {}).items() if _worth(k, v)}
    console.print_pairs(pairs, title="image")
    console.print_rows(
        ("stage", "verdict", "reason", "score", "threshold", "more"),
        [_verdict_row(row) for row in life["verdicts"]],
        title="verdicts",
    )
    if life["sources"]:
        console.print_pairs(life["sources"], title="images named above")
    own = "id" if life["flow"] == "pool" else "seed_id"
    _print_table([{k: v for k, v in hit.items() if k != own} for hit in life["hits"]], "hits")
    for part in ("manifest", "packed"):
        if life.get(part):
            shown = {k: v for k, v in life[part].items() if v is not None and k != "id"}
            console.print_pairs(shown, title=part)


def _print_file(image: str, work: str, as_json: bool) -> None:
    """What the run holds of a photo that may never have been listed."""
    from pipelines.audit.seen import look_for

    found = look_for(Path(image), work)
    if as_json:
        console.print_json(found)
        return
    shown = {name: _plain(value) for name, value in found.items() if not isinstance(value, list)}
    console.print_pairs(shown, title="photo")
    _print_table(found["verdicts"], "what the run's filters say of it")
    _print_table(found["equal"], "equal images in the run")
    _print_table(found["nearest"], "nearest images of the set")
    _print_table(found["nearest_benchmark"], "nearest benchmark images")


def _worth(name: str, value: Any) -> bool:
    return value is not None and name != "id"


def _verdict_row(row: Row) -> tuple[str, ...]:
    more = ", ".join(f"{k} {_plain(v)}" for k, v in row.items() if k not in _HIDDEN)
    return (
        row["stage"],
        "keep" if row["keep"] else "DROP",
        row["reason"] or "",
        _number(row["score"]),
        _number(row["threshold"]),
        more,
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else _number(value) if isinstance(value, float) else value
