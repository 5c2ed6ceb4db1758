"""The command line: its commands in order, and what their errors become.

Every command imports what it needs when it runs, so that --help is quick.
"""

import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import typer

from pipelines.cli import audit, build, operate, pages, similar, train
from pipelines.cli.options import OneValueEach, spelled_out

app = typer.Typer(
    name="curate",
    help="Turn a pool of web images into a self-supervised pretraining set, and train on it.\n\n"
    "Start with: curate run demo --work build/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "run": operate.run,
    "preflight": operate.preflight,
    "plan": operate.plan,
    "ingest": build.ingest,
    "download": build.download,
    "canonicalize": build.canonicalize,
    "filter": build.filter_images,
    "embed": build.embed,
    "dedup": similar.dedup,
    "retrieve": similar.retrieve,
    "cluster": similar.cluster,
    "balance": similar.balance,
    "select": build.select,
    "pack": build.pack,
    "stats": audit.stats,
    "sql": audit.sql,
    "explain": audit.explain,
    "report": pages.report,
    "serve": pages.serve,
    "calibrate": pages.calibrate,
    "verify": audit.verify,
    "diff": audit.diff,
    "certificate": audit.certificate,
    "card": audit.card,
    "forget": audit.forget,
    "status": operate.status,
    "clean": operate.clean,
    "pretrain": train.pretrain,
    "distill": train.distill,
    "evaluate": train.evaluate,
    "show": train.show,
    "export": train.export,
    "encoders": build.encoders,
}
for _name, _body in _COMMANDS.items():
    app.command(_name, cls=OneValueEach)(spelled_out(_body))


_INTERRUPTED = 130
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What the command line does not allow; typer keeps the tree of its errors to itself."""


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where help is."""
    verb = error.ctx.command_path.partition(" ")[2] if error.ctx else ""
    place, words = (f"{verb}: ", f"curate {verb}") if verb else ("", "curate")
    return f"{place}{error.format_message().rstrip('.')}; see `{words} --help`"


def main() -> None:
    """Run a verb; every error of ours becomes one line and an exit code."""
    # Threads that spin while they wait starve each other where cores are shared: a training step
    # took six times as long. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from curation.errors import ConfigError, EngineError, FailedShardsError
    from embedder.errors import CurateError, EncoderError
    from pipelines.operate.console import let_all_be_written, print_error

    let_all_be_written()
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that has shown the help by now
            print_error(_usage(error))
        sys.exit(2)
    except CurateError as error:
        retry = ""
        if isinstance(error, EngineError) and error.failures:
            command = shlex.join(["curate", *sys.argv[1:]])
            is_accepted = isinstance(error, FailedShardsError)
            accepts = "  (--max-failed-shards N accepts some)" if is_accepted else ""
            retry = f"; retry them with: {command}{accepts}"
        print_error(f"{error}{retry}")
        sys.exit(2 if isinstance(error, ConfigError | EncoderError) else 1)
    if code == _INTERRUPTED:
        print_error("stopped; run the same command again to go on")
    sys.exit(code)
