"""Holds the house together: who imports whom, what every stage, setting and YAML must have."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curation.config import Settings
from curation.registry import load_stage, stage_names
from pipelines.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
LEFT_TO_RIGHT = ("embedder", "curation", "pretrain", "pipelines")
SOURCES = sorted(file for name in LEFT_TO_RIGHT for file in (ROOT / name).rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports__point_left(file):
    package = file.relative_to(ROOT).parts[0]
    allowed = LEFT_TO_RIGHT[: LEFT_TO_RIGHT.index(package) + 1]
    ours = {name.partition(".")[0] for name in imported_modules(file)} & set(LEFT_TO_RIGHT)
    assert ours <= set(allowed)


def test_imports__only_pipelines_knows_ray_and_the_terminal():
    for file in SOURCES:
        if file.relative_to(ROOT).parts[0] != "pipelines":
            tops = {name.partition(".")[0] for name in imported_modules(file)}
            assert not tops & {"ray", "rich", "typer", "click"}, file


NEIGHBORS = ROOT / "curation" / "neighbors"
MAY_IMPORT = {
    "kernels": "",
    "rows": "kernels",
    "index": "kernels rows",
    "join": "kernels rows index",
    "search": "kernels rows index",
    "clusters": "kernels rows",
    "dedup": "kernels rows index join",
    "retrieval": "kernels rows index search clusters",
}
"""The folders of neighbors, and those that each builds on."""
FRONT_DOOR = "index/vector_index.py"
"""Chooses between exhaustive comparison and lists for joins and searches, and so imports them."""


WITHOUT_TEST = re.compile(
    r"index/(coarse_training|probes|train_quantizer|vector_index).py"
    r"|join/listed_pairs.py"
)
"""Modules that the tests of stages hold, until each has a test of its own."""


def neighbor_modules() -> list[Path]:
    return [file for file in sorted(NEIGHBORS.rglob("*.py")) if file.name != "__init__.py"]


def test_neighbors__folders_build_on_each_other_in_order():
    for file in neighbor_modules():
        place = file.relative_to(NEIGHBORS)
        allowed = {place.parts[0], *MAY_IMPORT[place.parts[0]].split()}
        if str(place) == FRONT_DOOR:
            allowed |= {"join", "search"}
        for name in imported_modules(file):
            parts = name.split(".")
            if parts[:2] == ["curation", "neighbors"]:
                assert parts[2] in allowed, f"{place} imports {name}"


def test_neighbors__kernels_are_arithmetic_alone():
    for file in (NEIGHBORS / "kernels").glob("*.py"):
        ours = {name for name in imported_modules(file) if name.partition(".")[0] in LEFT_TO_RIGHT}
        kernels = {name for name in ours if name.startswith("curation.neighbors.kernels.")}
        assert ours - kernels <= {"embedder.rows", "embedder.cpu"}, file


def test_neighbors__folders_say_what_goes_in_and_out():
    for folder in MAY_IMPORT:
        text = ast.get_docstring(ast.parse((NEIGHBORS / folder / "__init__.py").read_text()))
        assert text, folder
    assert {file.relative_to(NEIGHBORS).parts[0] for file in neighbor_modules()} == {*MAY_IMPORT}


@pytest.mark.parametrize(
    "file", neighbor_modules(), ids=lambda file: str(file.relative_to(NEIGHBORS))
)
def test_neighbors__every_module_has_its_test(file):
    place = file.relative_to(NEIGHBORS)
    if WITHOUT_TEST.fullmatch(str(place)):
        return
    test = ROOT / "tests" / "curation" / "neighbors" / place.parent / f"test_{file.name}"
    text = test.read_text()
    assert re.search(r"^def test_", text, re.MULTILINE), f"{test} tests nothing"
    name = ".".join(("curation", "neighbors", *place.with_suffix("").parts))
    folder, _, module = name.rpartition(".")
    imports_it = rf"from {re.escape(name)} import|from {re.escape(folder)} import .*\b{module}\b"
    assert re.search(imports_it, text), f"{test} does not import {name}"


@pytest.mark.parametrize("name", stage_names())
def test_stage__is_one_class_with_a_test(name):
    stage = load_stage(name, "here")
    assert stage.name() == name
    test = ROOT / "tests" / "curation" / "stages" / f"test_{name}.py"
    assert re.search(r"^def test_", test.read_text(), re.MULTILINE), f"{test} tests nothing"


OTHER_MEANINGS = {
    "cluster": "curation/.*|pipelines/.*",  # a column, and a rule of retrieval
    "faces": "pipelines/audit/sql.py",  # an output
    ".*": "pipelines/cli/app.py",  # names of commands
    "filters": "pipelines/cli/.*",  # a setting
    "blocklist": "curation/(blocklists|schema).py",  # a column
    "balance": "pipelines/(audit|cli)/.*",  # a part of the statistics
}
"""Names of stages, and the files where they stand for something else."""


def compared_strings(code: str) -> set[str]:
    """Constants that are compared, that are keys or members, or that `stage` is asked for."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            found += node.elts
        elif isinstance(node, ast.Dict):
            found += node.keys
        elif isinstance(node, ast.MatchValue):
            found.append(node.value)
        elif isinstance(node, ast.Subscript):
            found.append(node.slice)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "stage":
            found += node.args
    texts = (node.value for node in found if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str)}


def test_stages__say_what_they_are():
    """No other module compares a stage's name with a string to know what the stage does."""
    for file in SOURCES:
        place = str(file.relative_to(ROOT))
        found = compared_strings(file.read_text()) & {*stage_names()}
        for name, places in OTHER_MEANINGS.items():
            if re.fullmatch(places, place):
                found = {one for one in found if not re.fullmatch(name, one)}
        assert place.startswith("curation/stages/") or not found, place


@pytest.mark.parametrize(
    "code",
    [
        'if stage.name == "nsfw": pass',
        'ok = "nsfw" in names',
        'ok = stage.name in ("nsfw", "quality")',
        'FILTERS = frozenset({"nsfw"})',
        'MARKS = {"nsfw": "veiled"}',
        'mark = MARKS["nsfw"]',
        'stage = work.stage(POOL, "nsfw")',
        'match name:\n    case "nsfw": pass',
    ],
)
def test_compared_strings__are_found(code):
    assert "nsfw" in compared_strings(code)


def all_settings() -> list[type[Settings]]:
    for file in SOURCES:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if re.search(r"\(.*(Settings|Stage)\):", file.read_text()):
            __import__(module.removesuffix(".__init__"))
    found, waiting = [], [Settings]
    while waiting:
        current = waiting.pop()
        waiting += current.__subclasses__()
        if current.__module__.partition(".")[0] in LEFT_TO_RIGHT:
            found.append(current)
    return found


def test_settings__are_documented_and_read():
    text = "\n".join(file.read_text() for file in SOURCES)
    for settings in all_settings():
        for name, field in settings.model_fields.items():
            assert field.description, f"{settings.__name__}.{name} has no docstring"
            uses = len(re.findall(rf"\b{name}\b", text))
            assert uses >= 2, f"{settings.__name__}.{name} is read nowhere"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_config__loads(path, tmp_path):
    if path.parent.name == "recipes":
        load_recipe(str(path), {"work": str(tmp_path)})
    elif path.parent.name == "pretrain":
        from pretrain.copy_config import load_training_config

        load_training_config(str(path))
    elif path.parent.name == "distill":
        from pretrain.config import load_distill_config

        load_distill_config(str(path))
    elif path.parent.name == "evaluate":
        from pretrain.evaluation.results import paper_numbers

        assert all(set(entry) == {"task", "set", "metric", "values"} for entry in paper_numbers())
    else:
        pytest.fail(f"no test knows how to load {path}")


def test_help__loads_no_heavy_library():
    code = (
        "import sys, pipelines.cli.app; "
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'faiss', 'cv2', 'onnxruntime', 'duckdb'}; "
        "print(*sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_error_tree__every_error_of_ours_is_a_curate_error():
    import curation.errors as errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.CurateError)


RUNS_WHAT_IT_READS = re.compile(
    r"(c?pickle|dill|cloudpickle|marshal|shelve|joblib)\.(load|loads|open|Unpickler)"
    r"|(pd|pandas)\.read_pickle|yaml\.(load|load_all|full_load|unsafe_load)|torch\.hub\.load"
    r"|torch\.jit\.load|FileSystemReader|eval|exec|compile"
)
BETWEEN_OWN_PROCESSES = r"pipelines/engines/(outcome|worker_process)\.py"
"""Files whose pickles come from processes that they started."""
TAKES_WEIGHTS_ONLY = re.compile(r"torch\.load|.*\.load_checkpoint|open_clip\.create_model")


def unsafe_calls(code: str) -> list[str]:
    """Calls that run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(code)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        keywords = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", [])}
        is_bare = keywords.get("weights_only") != "True" and keywords.get("load_weights") != "False"
        if (
            RUNS_WHAT_IT_READS.fullmatch(name)
            or (TAKES_WEIGHTS_ONLY.fullmatch(name) and is_bare)
            or keywords.get("allow_pickle", "False") != "False"
        ):
            found.append(name)
    return found


def test_loaders__run_nothing_that_data_or_weights_hold():
    for file in SOURCES:
        text = file.read_text()
        is_between_ours = re.match(BETWEEN_OWN_PROCESSES, str(file.relative_to(ROOT)))
        allowed = ["pickle.loads", "pickle.load"] if is_between_ours else []
        allowed += ["yaml.load"] if re.search(r"Loader\(yaml\.C?SafeLoader\)", text) else []
        assert [call for call in unsafe_calls(text) if call not in allowed] == [], file
        # What these names stand for is looked at by the one file that has them.
        assert "torch.jit.load" not in text or file.name == "torchscript.py"
        assert "state_dict_loader" not in text or "storage_reader=TensorReader(" in text


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "pickle.load(f)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, Loader=yaml.Loader)",
        "torch.jit.load(p)",
    ],
)
def test_unsafe_calls__are_found(code):
    assert unsafe_calls(code) == [code.partition("(")[0]]
