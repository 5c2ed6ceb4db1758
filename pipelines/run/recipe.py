"""Recipes: YAML -> stages, checked end to end before the first row."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field

from curation.config import Name, Settings, apply_changes, find_config, parse_settings, read_mapping
from curation.errors import ConfigError
from curation.registry import load_stage
from curation.stage import Stage
from curation.stages.canonicalize import Canonicalize
from curation.stages.ingest import Ingest
from pipelines.audit.tombstones import id_files, with_tombstones
from pipelines.run.demo_site import DemoSite

_VARIABLE = re.compile(r"\$\{([a-zA-Z0-9_.]+)\}")


class SetSource(Settings):
    """A benchmark, a seed set, or a set taken as it is; its role follows from who names it."""

    images: str | None = None
    """A folder of images, tars or Parquet with image bytes."""
    urls: str | None = None
    """A list of URLs."""
    expected_rows: int | None = None
    """How many images the set should have; for planning and checks."""
    expected_hits: int | None = None
    """How many images its cluster rule should find before the cap; for planning and checks."""


class PretrainStep(Settings):
    """Pretraining on the packed shards at the end of a recipe."""

    config: str
    """A file, or the name of one in configs/pretrain."""
    set: tuple[str, ...] = ()
    """Changes of single keys, as KEY=VALUE."""


class EvaluateStep(Settings):
    """k-NN with the pretrained backbone on a labeled folder of images."""

    train: str
    """A folder with one folder of images a class."""
    test: str
    """The same for the images to classify."""
    k: tuple[int, ...] = (10, 20)
    """Numbers of neighbors."""


class Recipe(Settings):
    """The whole job, from a list of URLs to a training set."""

    name: Name
    """Name of the recipe, for reports."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """Seeds every random choice."""
    rows_per_shard: int = Field(10_000, ge=1, lt=1 << 31)
    """About how many rows lie in one shard; it does not change the content."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only a uniform sample of about so many rows of the pool, and of each set; null: all."""
    keep_raw: bool = False
    """Whether the fetched bytes stay after canonicalize has committed."""
    forgotten: tuple[str, ...] = ()
    """Folders that `curate forget` left: what it took out of those builds stays out of this one."""
    paths: dict[str, str] = {}
    """Values of ${name} in the rest of the recipe; ${work} is the work folder."""
    sets: dict[Name, SetSource] = {}
    """Benchmarks and seed sets by name."""
    pool: tuple[str | dict[str, dict[str, Any] | None], ...] = Field(min_length=1)
    """The stages in order: a name, or a name with settings. The first is `ingest`."""
    pretrain: PretrainStep | None = None
    """Pretraining at the end."""
    evaluate: EvaluateStep | None = None
    """Evaluation of what pretraining made."""
    demo_site: DemoSite | None = None
    """For the demo: serve sample photos on loopback while the recipe runs."""


@dataclass
class CheckedRecipe:
    """A recipe whose stages have been built and checked."""

    recipe: Recipe
    where: str
    """The file, for errors."""

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages of the pool, in order."""
        return [_build_stage(entry, self.recipe, self.where) for entry in self.recipe.pool]

    def roles(self) -> dict[str, set[str]]:
        """Which stages name each set."""
        used: dict[str, set[str]] = {name: set() for name in self.recipe.sets}
        for stage in self.stages:
            for name in stage.set_names():
                if name not in used:
                    raise ConfigError(
                        f"{self.where}: stage '{stage.name()}' names the set '{name}'"
                        f"{_nearest(name, used)}"
                    )
                used[name].add(stage.name())
        return used

    def benchmarks(self) -> list[str]:
        """Sets that must not leak: they are compared with, and never taken."""
        checking = self._checking()
        return [name for name, stages in self.roles().items() if stages & checking]

    def _checking(self) -> set[str]:
        """Names of the stages that look for leaks of the sets that they name."""
        return {stage.name() for stage in self.stages if stage.checks_benchmarks}

    def set_stages(self, name: str) -> list[Stage]:
        """The stages that a set passes: its own ingest, then the pool's where they fit."""
        source = self.recipe.sets[name]
        ingest = Ingest(
            urls=source.urls,
            images=source.images,
            source_set=name,
            rows_per_shard=self.recipe.rows_per_shard,
            max_rows=self.recipe.max_rows,
            forgotten=id_files(self.recipe.forgotten),
        )
        wanted = [stage for stage in self.stages if stage.on_sets or self._fetches(stage, source)]
        compared = (self._compared_for_sets(stage) for stage in wanted)
        is_benchmark = name in self.benchmarks()
        kept = (stage for stage in compared if stage and not (is_benchmark and stage.set_names()))
        return [ingest, *kept]

    def _compared_for_sets(self, stage: Stage) -> Stage | None:
        """The stage as sets pass it: compared with benchmarks that are nothing else.

        A training split that is a seed set and must not leak from the pool is no leak of itself.
        """
        if not stage.set_names():
            return stage
        roles, checking = self.roles(), self._checking()
        pure = tuple(n for n in stage.set_names() if roles[n] <= checking)
        return stage.replace(against=pure) if pure else None

    @staticmethod
    def _fetches(stage: Stage, source: SetSource) -> bool:
        return stage.fetches and source.urls is not None


def load_recipe(name: str, variables: dict[str, str], changes: Iterable[str] = ()) -> CheckedRecipe:
    """Read a recipe by file or by the name of one that ships, and check it.

    variables: values of ${name} besides the recipe's own paths. changes: KEY=VALUE for single
    keys, such as paths.pool=/data/urls.

    Raises:
        ConfigError: one line that names the file, the key, and what is allowed.
    """
    path = find_config("recipes", name)
    values = read_mapping(path)
    apply_changes(values, changes)
    known = {**variables, **{key: str(value) for key, value in (values.get("paths") or {}).items()}}
    filled = _fill(values, known, str(path))
    checked = CheckedRecipe(recipe=parse_settings(Recipe, filled, str(path)), where=str(path))
    check_columns(checked)
    return checked


def check_columns(checked: CheckedRecipe) -> None:
    """Check that each stage finds the columns and sets that it needs.

    Raises:
        ConfigError: names the stage, the column, and the stages before it.
    """
    stages = checked.stages
    if not isinstance(stages[0], Ingest):
        raise ConfigError(f"{checked.where}: the first stage must be 'ingest'")
    checked.roles()
    flows = [("pool", stages), *((n, checked.set_stages(n)) for n in checked.recipe.sets)]
    for flow, its_stages in flows:
        present: set[str] = {"id"}
        sides: set[str] = set()
        for stage in its_stages:
            _check_stage(stage, present, sides, f"{checked.where}: {flow}")
            for output, names in stage.output_columns().items():
                present.update(names)
                sides.add(output)


def _check_stage(stage: Stage, present: set[str], sides: set[str], where: str) -> None:
    missing = [name for name in stage.required_columns() if name not in present]
    if missing:
        raise ConfigError(
            f"{where}: stage '{stage.name()}' needs the column '{missing[0]}', which no stage "
            f"before it makes; there are: {', '.join(sorted(present))}"
        )
    embeddings = getattr(stage, "embeddings", None)
    if embeddings is not None and embeddings not in sides:
        raise ConfigError(
            f"{where}: stage '{stage.name()}' reads the embeddings '{embeddings}', which no "
            f"'embed' before it makes; there are: {', '.join(sorted(sides))}"
        )


def _build_stage(
    entry: str | dict[str, dict[str, Any] | None], recipe: Recipe, where: str
) -> Stage:
    if isinstance(entry, str):
        name, settings = entry, {}
    elif len(entry) == 1:
        name, found = next(iter(entry.items()))
        settings = dict(found or {})
    else:
        raise ConfigError(f"{where}: pool: one stage an entry, found {', '.join(entry)}")
    kind = load_stage(name, f"{where}: pool")
    if kind is Ingest:
        settings.setdefault("rows_per_shard", recipe.rows_per_shard)
        settings.setdefault("max_rows", recipe.max_rows)
        settings.setdefault("forgotten", id_files(recipe.forgotten))
    if kind is Canonicalize and recipe.forgotten:
        settings["blocklists"] = with_tombstones(settings.get("blocklists"), recipe.forgotten)
    return parse_settings(kind, settings, f"{where}: {name}")


def _fill(value: Any, known: dict[str, str], where: str) -> Any:
    """Put the values of ${name} into all texts."""
    if isinstance(value, dict):
        return {key: _fill(inner, known, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, known, where) for inner in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        if match.group(1) not in known:
            raise ConfigError(
                f"{where}: ${{{match.group(1)}}} has no value{_nearest(match.group(1), known)}; "
                f"add it under 'paths', or pass --set paths.{match.group(1)}=…"
            )
        return known[match.group(1)]

    return _VARIABLE.sub(lookup, value)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return (
        f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(known) or 'none'}"
    )


def expected_counts(checked: CheckedRecipe) -> dict[str, int]:
    """Images that each rule should give, before collisions: "SET RULE" -> count.

    k x |Q| for sample rules, the cap (or what the clusters hold) for cluster rules, |Q| for sets
    taken as they are.

    Raises:
        ConfigError: a set lacks expected_rows or expected_hits.
    """
    sets = checked.recipe.sets
    counts: dict[str, int] = {}
    for stage in checked.stages:
        for name in getattr(stage, "as_is", ()):
            counts[f"{name} as is"] = _expected(checked, name, sets[name].expected_rows)
        for rule in getattr(stage, "seeds", ()):
            if rule.rule == "sample":
                rows = _expected(checked, rule.set, sets[rule.set].expected_rows)
                counts[f"{rule.set} sample"] = rule.k * rows
            else:
                hits = _expected(checked, rule.set, sets[rule.set].expected_hits)
                counts[f"{rule.set} cluster"] = min(rule.cap, hits)
    return counts


def _expected(checked: CheckedRecipe, name: str, count: int | None) -> int:
    if count is None:
        raise ConfigError(f"{checked.where}: sets.{name} lacks what it is expected to hold")
    return count
