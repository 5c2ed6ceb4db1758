"""`curate evaluate`: measure an encoder, keep the result, show it beside the paper's."""

import os
from typing import TYPE_CHECKING, Any

from curation.errors import ConfigError
from pipelines.operate import console

if TYPE_CHECKING:
    from pretrain.evaluation.tasks import Request

TABLE = "table"


def run_evaluation(
    task: str, paths: dict[str, str | None], options: dict[str, Any], as_json: bool
) -> None:
    """Run a task, or show the results of a folder.

    Raises:
        ConfigError: what to test is not named.
    """
    console.set_up_logging(False)
    if task == TABLE:
        _print_table(paths["out"], as_json)
        return
    if paths["test"] is None:
        raise ConfigError(f"curate evaluate {task}: name the images to test: --test")
    from pretrain.evaluation.tasks import Request

    request = Request(task, paths["encoder"], paths["train"], str(paths["test"]), **options)
    _evaluate(request, paths["out"], as_json)


def _evaluate(request: "Request", out: str | None, as_json: bool) -> None:
    import pyarrow as pa

    from pretrain.evaluation.results import SCHEMA, comparison, write_result
    from pretrain.evaluation.tasks import run_task

    result = run_task(request)
    if os.environ.get("RANK", "0") != "0":
        return
    written = {} if out is None else {"result": write_result(result, out)}
    if as_json:
        about = {"task": result.task, "encoder": result.encoder, "seconds": result.seconds}
        counts = {"train": result.num_train, "test": result.num_test}
        console.print_json({**result.metrics, **counts, **about, **written})
        return
    rows = pa.Table.from_pylist([result.row()], schema=SCHEMA)
    _print_comparison(comparison(rows), request.task)
    console.print_pairs(
        {
            "train": result.num_train,
            "test": result.num_test,
            **{name: f"{value:.4g}" for name, value in result.metrics.items()},
            "seconds": f"{result.seconds:.1f}",
            **written,
        },
        title="",
    )


def _print_table(out: str | None, as_json: bool) -> None:
    from pretrain.evaluation.results import comparison, read_results

    if out is None:
        raise ConfigError("curate evaluate table: name the folder of results: --out")
    rows = read_results(out)
    if as_json:
        console.print_json(rows.to_pylist())
    else:
        _print_comparison(comparison(rows), "results")


def _print_comparison(lines: list[tuple[str, str, str, str]], title: str) -> None:
    console.print_rows(("model", "data", "metric", "value"), lines, title)
