"""What a run of a recipe did, and where everything lies: `run.json` in its work folder."""

from typing import Annotated

from pydantic import AfterValidator, Field

from curation import storage
from curation.config import Settings, parse_settings
from curation.dataset import Dataset
from curation.errors import DatasetError
from curation.ledger import StageRecord
from curation.registry import load_stage
from curation.sources.places import RUN_FILE as RUN_FILE
from curation.stage import Stage

POOL = "pool"


def _below(folder: str) -> str:
    if not folder or "\0" in folder or {"", ".", ".."} & set(folder.split("/")):
        raise ValueError("a folder below the work folder is wanted")
    return folder


Below = Annotated[str, AfterValidator(_below)]


class StageEntry(Settings):
    """One finished stage of a flow."""

    stage: str
    """Name of the stage."""
    folder: Below
    """Its folder, relative to the work folder."""
    record: StageRecord
    """What it did."""

    @property
    def kind(self) -> type[Stage]:
        """The stage's class, which says what stages of its name do."""
        return load_stage(self.stage, self.folder)

    def built(self) -> Stage:
        """The stage with the settings that it ran with."""
        return parse_settings(self.kind, self.record.settings, self.folder)


class RunRecord(Settings):
    """What a run of a recipe did, and where everything lies, relative to the work folder."""

    recipe: str
    """Name of the recipe."""
    recipe_file: str
    """Where it was read from."""
    seed: int
    """Seed of the run."""
    pool: tuple[StageEntry, ...] = Field(min_length=1)
    """Stages of the pool, in order."""
    sets: dict[str, tuple[StageEntry, ...]] = {}
    """Stages of each benchmark and seed set."""
    roles: dict[str, tuple[str, ...]] = {}
    """Stages that name each set."""
    as_is: tuple[str, ...] = ()
    """Sets taken as they are: they join the pool at the union."""
    manifest: Below | None = None
    """The published manifest."""
    packed: Below | None = None
    """The packed shards."""
    versions: dict[str, str] = {}
    """Versions of what computes."""
    base: str | None = None
    """Work folder of the earlier run whose rows this one does not take again."""
    base_digest: str = ""
    """Digest of what that run and those before it did."""
    stamp: str = ""
    """Digest of recipe, versions and the stamps of all files read: the same, nothing to do."""

    @property
    def entries(self) -> list[StageEntry]:
        """The stages of all flows."""
        return [*self.pool, *(entry for flow in self.sets.values() for entry in flow)]


def read_run(work: str) -> RunRecord:
    """The record of a finished run.

    Raises:
        DatasetError: no run has finished there.
    """
    path = storage.join(work, RUN_FILE)
    if not storage.exists(path):
        raise DatasetError(
            f"{work}: no finished run there (no {RUN_FILE}); run `curate run RECIPE --work {work}`"
        )
    return parse_settings(RunRecord, storage.read_json(path), path)


def open_manifest(work: str) -> Dataset:
    """The published manifest of a run."""
    record = read_run(work)
    if record.manifest is None:
        raise DatasetError(f"{work}: the recipe '{record.recipe}' has no 'select', so no manifest")
    return Dataset.open(storage.join(work, record.manifest))
