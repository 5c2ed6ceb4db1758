"""Runs one stage for a command: its settings from options and --set, its outputs in one folder."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from curation import storage
from curation.config import apply_changes, laid_over, parse_settings
from curation.dataset import Dataset
from curation.errors import ConfigError
from curation.lost_files import require_files
from curation.registry import load_stage
from curation.stage import Engine, Stage, StageFolder, StageInputs
from curation.stages.filters import Filters
from pipelines.operate import console
from pipelines.run.settling import Settling
from pipelines.run.stage_runner import StageRunner

Settings = dict[str, Any]
_HOSTS_SHOWN = 10


def run_single(
    stage: Stage,
    inputs: StageInputs,
    out: str,
    primary: str,
    runner: StageRunner,
    elsewhere: dict[str, str] | None = None,
    facts: Settings | None = None,
) -> dict[str, Dataset]:
    """Run one stage with its main output at the root of `out`; print a line on it.

    elsewhere: outputs that lie in folders of their own. facts: what is true of all outputs.
    """
    console.set_up_logging(False)
    for pool in (inputs.pool, *inputs.sets.values(), *inputs.base):
        require_files(pool.datasets())
    others, known = (tuple((some or {}).items()) for some in (elsewhere, facts))
    folder = StageFolder(out.rstrip("/"), stage.name(), primary, others, known)
    stage = settling_in(out, runner.engine).settle(stage)
    record, outputs = runner.run(stage, inputs, folder)
    figures = record.figures.items()
    console.print_pairs(
        {
            "rows in": record.rows_in,
            **{f"dropped: {reason}": count for reason, count in record.dropped.items()},
            "rows out": record.rows_out,
            **{name: value for name, value in figures if isinstance(value, int | float | str)},
            "output": out,
            "content digest": Dataset.open(folder.output(primary)).manifest.content_digest,
        },
        title=stage.name(),
    )
    return outputs


def settling_in(out: str, engine: Engine) -> Settling:
    """What settles the stages of one output folder."""
    return Settling(engine, storage.join(out, "_settled", "settings.json"))


def parse_changes(changes: Sequence[str] | None) -> Settings:
    """Read KEY=VALUE texts; values are YAML, dots in keys lead into inner settings."""
    values: Settings = {}
    apply_changes(values, changes or [])
    return values


def build_stage(
    name: str, changes: Sequence[str] | None, settings: Settings | None = None
) -> Stage:
    """Build a stage from settings and KEY=VALUE changes."""
    values = laid_over(settings or {}, parse_changes(changes))
    return parse_settings(load_stage(name, "--set"), values, f"--set of '{name}'")


def with_options(
    command: str, settings: Settings, changes: Sequence[str] | None, given: Settings
) -> Settings:
    """Settings of a command, with the changes that --set asks for.

    given: settings that other options say.

    Raises:
        ConfigError: --set changes one of `given`, which would be lost.
    """
    changed = parse_changes(changes)
    for key in sorted(given.keys() & changed.keys()):
        raise ConfigError(f"curate {command}: --set {key}: is said by the verb's own options")
    return {**laid_over(settings, changed), **given}


def chain_filters(text: str, changes: Sequence[str] | None) -> Filters:
    """The filters named in order, with the settings of each.

    Raises:
        ConfigError: a name that is no filter or stands there twice, or a setting that cannot be.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    settings: dict[str, Settings] = {name: {} for name in names}
    if len(settings) < len(names):
        raise ConfigError(f"--filters {text}: names a filter twice; name each once, in order")
    for name, values in parse_changes(changes).items():
        if name not in settings or not isinstance(values, dict):
            raise ConfigError(f"--set {name}: write FILTER.KEY=VALUE; filters: {', '.join(names)}")
        settings[name] = values
    for name, values in settings.items():
        parse_settings(load_stage(name, "--filters"), values, f"--set of '{name}'")
    chain = [{name: values} for name, values in settings.items()]
    return parse_settings(Filters, {"filters": chain}, "curate filter")


def print_hosts(hosts: pa.Table) -> None:
    """The hosts with the most rows."""
    if not hosts.num_rows:
        return
    title = f"by host ({min(_HOSTS_SHOWN, hosts.num_rows)} of {hosts.num_rows:,})"
    columns = (column.to_pylist() for column in hosts.slice(0, _HOSTS_SHOWN).columns)
    console.print_rows(hosts.column_names, list(zip(*columns, strict=True)), title)
