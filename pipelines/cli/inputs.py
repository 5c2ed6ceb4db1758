"""What commands are given: images in whatever form, and texts such as NAME=PATH."""

from collections import Counter
from collections.abc import Iterable, Sequence

from curation import storage
from curation.dataset import Dataset
from curation.digest import digest_of
from curation.errors import ConfigError, SchemaError
from curation.identity import SET_NAME_VERSION, checked_set_name, set_name_of
from curation.lost_files import require_files
from curation.pool import Pool, UnionPool
from curation.same_ids import SameIds
from curation.sources.places import RAW, is_packed
from curation.stage import DECISIONS, Engine, StageFolder, StageInputs
from curation.stages.canonicalize import Canonicalize
from curation.stages.ingest import Ingest
from pipelines.run.stage_runner import StageRunner

HOW_IDS_ARE_MADE = {"set_name_version": SET_NAME_VERSION}
"""Beside what the manifest's stage says of it."""


def images_pool(
    path: str, out: str, runner: StageRunner, name: str = "pool", set_name: str | None = None
) -> Pool:
    """The images of a finished data set, or of a folder of files, tars or Parquet.

    A folder is ingested and canonicalized below `out` first. set_name: of a folder; by default its
    own name.
    """
    if Dataset.is_finished(path) and "image" in Dataset.open(path).columns:
        images = Dataset.open(path)
        require_files([images])
        return Pool.of(images, name)
    raw = raw_pool(path, out, runner, name, set_name)
    folder = StageFolder(storage.join(out, f"_images-{name}"), "canonicalize")
    _, outputs = runner.run(Canonicalize(), StageInputs(raw), folder)
    decisions = outputs.pop(DECISIONS)
    return raw.with_stage(outputs, decisions)


def raw_pool(
    path: str, out: str, runner: StageRunner, name: str = "pool", set_name: str | None = None
) -> Pool:
    """Images as they were fetched: what download or ingest wrote, or a folder that is ingested.

    Raises:
        SchemaError: a data set without such images.
    """
    if not Dataset.is_finished(path) or is_packed(Dataset.open(path)):
        stage = Ingest(images=path, source_set=chosen_set_name(path, set_name))
        return ingested(stage, out, runner, name)
    dataset, raw = Dataset.open(path), storage.join(path, RAW)
    if "raw" in dataset.columns:
        return Pool.of(dataset, name)
    if Dataset.is_finished(raw):  # `curate ingest --images` lays the bytes beside the rows
        return Pool(name, {"rows": dataset, "raw": Dataset.open(raw)})
    raise SchemaError(
        f"{path}: holds no images as they were fetched; found: {', '.join(dataset.columns)}; give "
        "the output of download or of ingest --images, or a folder of images"
    )


def ingested(stage: Ingest, out: str, runner: StageRunner, name: str = "pool") -> Pool:
    """The rows of a list or a folder, ingested below `out`."""
    root = storage.join(out, f"_ingest-{name}")
    folder = StageFolder(root, "ingest", facts=tuple(HOW_IDS_ARE_MADE.items()))
    pool = Pool(name, {})
    _, outputs = runner.run(stage, StageInputs(pool), folder)
    decisions = outputs.pop(DECISIONS)
    return pool.with_stage(outputs, decisions)


def images_of(pool: Pool) -> Dataset:
    """The side-car that holds the images of a pool."""
    return next(one for one in reversed(pool.layers.values()) if "image" in one.columns)


def rows_of(pool: Pool) -> Dataset:
    """The side-car that says where the rows of a pool are from."""
    return next(iter(pool.layers.values()))


def refuse_clashes(pools: Sequence[Pool], column: str, out: str, engine: Engine) -> None:
    """Refuse sets that hold one id for different images. column: what tells images apart.

    Raises:
        DatasetError: names two sets and an id.
    """
    union = UnionPool("sets", {}, None, tuple(pools))
    folder = storage.join(out, "_scratch", f"ids-{digest_of(union.fingerprint([column]))}")
    SameIds(union, column).without_repeats(engine, folder)
    storage.remove(folder)


def chosen_set_name(path: str, given: str | None) -> str:
    """The set of a folder: as --set-name says, else the folder's own name."""
    return set_name_of(path) if given is None else checked_set_name(given, "--set-name")


def named_paths(texts: Iterable[str] | None, what: str) -> list[tuple[str, str]]:
    """Read texts NAME=PATH.

    Raises:
        ConfigError: one is none, or its name can be none.
    """
    found = []
    for text in texts or []:
        name, equals, path = text.partition("=")
        if not (equals and path):
            raise ConfigError(f"{what} {text}: write NAME=PATH")
        found.append((checked_set_name(name, what), path))
    return found


def refuse_repeats(names: Iterable[str], what: str) -> None:
    """Refuse names that stand there twice, so that one of the sets would be lost.

    Raises:
        ConfigError: names the first of them.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{what} {name}: stands there twice; give each set its own name")
