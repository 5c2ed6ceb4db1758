"""Options that several commands share, and how the command line reads them.

A parameter of a command whose type is a data class stands for the fields of that class:
`spelled_out` gives the command that typer reads.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from curation.errors import ConfigError

if TYPE_CHECKING:
    from curation.stage import Engine
    from pipelines.run.stage_runner import StageRunner

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of one that ships.")]
Images = Annotated[str, typer.Argument(help="Output of canonicalize, or a folder of images.")]
Embeddings = Annotated[str, typer.Argument(help="Output of embed, or any Parquet of vectors.")]
RunFolder = Annotated[str, typer.Argument(help="Work folder of a run.")]
Out = Annotated[str, typer.Option("--out", help="Folder or URL of the output.")]
Work = Annotated[str, typer.Option("--work", help="Work folder of a run.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seeds every random choice.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key: KEY=VALUE. May be repeated.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="What tasks on one machine may hold at once. [4GB]"),
]
SetName = Annotated[
    str | None,
    typer.Option(
        "--set-name",
        "--source-set",
        help="Set of a folder of files, part of their ids. [the folder's own name]",
    ),
]
AssumeSameSpace = Annotated[
    bool, typer.Option("--assume-same-space", help="Compare foreign embeddings.")
]
TrainingData = Annotated[
    str, typer.Option("--data", help="A work folder, manifest, packed shards or images.")
]
AllowChanged = Annotated[
    bool,
    typer.Option(
        "--allow-changed",
        help="Go on with other data or settings; log and card say so.",
    ),
]


class EngineName(StrEnum):
    """Where the work runs."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True)
class EngineOptions:
    """Where a command works."""

    engine: Annotated[
        EngineName, typer.Option("--engine", help="This machine, or a Ray cluster.")
    ] = EngineName.local
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Tasks that run at once: 1 here, all of a cluster."),
    ] = None
    address: Annotated[str | None, typer.Option("--address", help="Address of a Ray cluster.")] = (
        None
    )

    @property
    def time_limit_s(self) -> float | None:
        """Seconds that an item may take, where the command says so."""
        return None

    def start(self) -> "Engine":
        """The engine; its workers start with its first task."""
        if self.engine is EngineName.ray or self.address:
            from pipelines.engines.ray_engine import RayEngine

            return RayEngine(self.workers, address=self.address, time_limit_s=self.time_limit_s)
        from pipelines.engines.local_engine import LocalEngine

        return LocalEngine(self.workers or 1, time_limit_s=self.time_limit_s)


@dataclass(frozen=True)
class StageOptions(EngineOptions):
    """Where a command runs its stage, and how long a shard may take."""

    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            min=1,
            help="Seconds after which a shard is taken to hang. [its stage's]",
        ),
    ] = None
    max_failed_shards = 0

    @property
    def time_limit_s(self) -> float | None:
        """Seconds that an item may take, where the command says so."""
        return self.time_limit

    def runner(self) -> "StageRunner":
        """What runs the stages of a single command, and shows how far they are."""
        from pipelines.operate.console import ConsoleWatcher
        from pipelines.run.stage_runner import StageRunner

        return StageRunner(self.start(), ConsoleWatcher(), self.max_failed_shards)


@dataclass(frozen=True)
class ShardOptions(StageOptions):
    """The same for stages that work shard by shard, some of which may fail."""

    max_failed_shards: Annotated[
        int,
        typer.Option("--max-failed-shards", min=0, help="Shards of a stage that may keep failing."),
    ] = 0


@dataclass(frozen=True)
class ColumnOptions:
    """Names of columns in foreign Parquet."""

    id_column: Annotated[
        str, typer.Option("--id-column", help="Column of ids in foreign Parquet.")
    ] = "id"
    embedding_column: Annotated[
        str, typer.Option("--embedding-column", help="Column of vectors in foreign Parquet.")
    ] = "embedding"


@dataclass(frozen=True)
class ServerOptions:
    """Where a page is served, and from which catalog."""

    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1"
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="Name that browsers use, where --host is not this machine."
        ),
    ] = None
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8750
    catalog: Annotated[
        str | None, typer.Option("--catalog", help="File of the sorted lists, made if absent.")
    ] = None


@dataclass(frozen=True)
class LabOptions(ServerOptions):
    """The same for the threshold lab."""

    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8751


def spelled_out(body: Callable[..., None]) -> Callable[..., None]:
    """A command with the fields of its groups of options in place of the groups."""
    signature = inspect.signature(body)
    groups = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }
    parameters = [
        option
        for name, parameter in signature.parameters.items()
        for option in (
            inspect.signature(groups[name]).parameters.values() if name in groups else [parameter]
        )
    ]

    @functools.wraps(body)
    def command(**given: object) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        body(**given)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in parameters}
    return command


class OneValueEach(TyperCommand):
    """A command that loses no value: a text given twice for an option that takes one is refused.

    Of numbers and choices the last counts, so that a command can be repeated with another.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look at the options before they are read.

        Raises:
            ConfigError: names the option.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        kinds = get_type_hints(self.callback)
        for option in order:
            takes_one = kinds.get(str(option.name)) in (str, str | None)
            if takes_one and order.count(option) > 1:
                raise ConfigError(
                    f"curate {ctx.info_name}: {option.opts[0]} is given {order.count(option)} "
                    "times and takes one value; give it once"
                )
        return super().parse_args(ctx, args)
