"""How the command line reads options and --set: nothing given is lost, and errors are one line."""

import inspect
from dataclasses import dataclass
from typing import get_type_hints

import pytest
from small_pictures import picture
from typer.testing import CliRunner

from curation.dataset import Dataset
from curation.errors import ConfigError
from embedder.images import encode_jpeg
from pipelines.cli.app import app
from pipelines.cli.options import spelled_out


def error_of(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, ConfigError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def texts():
    """Every verb with every option that takes one text."""
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        hints = get_type_hints(command.callback, include_extras=True)
        for kind in hints.values():
            for option in getattr(kind, "__metadata__", ()):
                declared = getattr(option, "param_decls", None) or ()
                flag = next((one for one in declared if one.startswith("--")), None)
                if flag and kind.__origin__ in (str, str | None):
                    yield name, flag


@pytest.mark.parametrize(("verb", "option"), sorted(texts()))
def test_options__of_one_text_are_never_lost(verb, option):
    line = error_of(verb, "a", option, "one", option, "two")
    assert line.startswith(f"curate {verb}: --")
    assert "is given 2 times" in line


@pytest.mark.parametrize("verb", ["dedup", "retrieve", "select"])
def test_options__two_sets_of_one_name_are_refused(verb):
    option = {"dedup": "--against", "retrieve": "--seeds"}.get(verb)
    tail = ":sample:3" if verb == "retrieve" else ""
    named = [f"a=x{tail}", f"a=y{tail}"]
    words = [word for one in named for word in ((option, one) if option else (one,))]
    given = ("pool",) if option else ()
    assert "a: stands there twice" in error_of(verb, *given, *words, "--out", "o")


@pytest.mark.parametrize(
    "named", ["../x=p", "/x=p", "a\\b=p", "=p", "..=p", ".=p", "a\n=p", "a/../b=p"]
)
@pytest.mark.parametrize("verb", ["select", "dedup"])
def test_options__a_name_that_leads_elsewhere_is_refused(verb, named):
    words = (named,) if verb == "select" else ("pool", "--against", named)
    assert "cannot name a set" in error_of(verb, *words, "--out", "o")


SETTABLE = {
    "ingest": ("--images", "x"),
    "download": ("x", "--allow-private"),
    "canonicalize": ("x",),
    "filter": ("x",),
    "embed": ("x", "--encoder", "lite-copy"),
    "dedup": ("x",),
    "retrieve": ("x", "--seeds", "s=x:sample:3"),
    "cluster": ("x", "--levels", "3"),
    "run": ("demo", "--work", "o"),
    "plan": ("demo", "--images", "10"),
    "pretrain": ("tiny", "--data", "x"),
    "distill": ("tiny", "--data", "x", "--teacher", "x"),
}


@pytest.mark.parametrize("change", ["nope=1", "nope", "a.b.c=[1", "=1", "nope.deep=null"])
@pytest.mark.parametrize("verb", sorted(SETTABLE))
def test_set__what_cannot_be_is_one_line(verb, change, tmp_path):
    out = () if verb in ("run", "plan") else ("--out", tmp_path / "o")
    error_of(verb, *SETTABLE[verb], *out, "--set", change)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        *(("dedup", key) for key in ("embeddings", "against", "embedding_column")),
        *(("retrieve", key) for key in ("seeds", "embeddings")),
        ("cluster", "levels"),
        ("embed", "encoders"),
    ],
)
def test_set__what_options_say_is_not_lost(verb, key, tmp_path):
    line = error_of(verb, *SETTABLE[verb], "--out", tmp_path / "o", "--set", f"{key}=[a]")
    assert f"--set {key}: is said by the verb's own options" in line


def test_set__takes_back_no_list_and_no_settings():
    words = ("ingest", "--urls", "x", "--out", "o")
    lost = [
        ("forgotten=[a]", "forgotten=[b]"),
        ("lists.schemes=[http]", "lists={pages: false}"),
        ("lists={pages: true}", "lists={schemes: [http]}"),
    ]
    for one, other in lost:
        line = error_of(*words, "--set", one, "--set", other)
        assert f"--set {other}: takes back what --set {one.partition('=')[0]}" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("quality.nope=1", "--set of 'quality': unknown key 'nope'"),
        ("quality.min_side=x", "--set of 'quality': 'min_side' is \"x\""),
        ("nsfw.threshold=2", "--set of 'nsfw': 'threshold' is 2"),
        ("quality=3", "write FILTER.KEY=VALUE"),
        ("faces.min_face=3", "write FILTER.KEY=VALUE"),
    ],
)
def test_filter__a_wrong_setting_is_one_line(tmp_path, change, said):
    assert said in error_of("filter", tmp_path, "--out", tmp_path / "o", "--set", change)


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ("", "filters"),
        ("qualty", "did you mean 'quality'"),
        ("exact_dedup", "'exact_dedup' is no filter"),
        ("quality,nsfw,quality", "names a filter twice"),
    ],
)
def test_filter__wrong_names_are_one_line(tmp_path, filters, said):
    assert said in error_of("filter", tmp_path, "--filters", filters, "--out", tmp_path / "o")


def test_filter__null_switches_each_bound_off(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode_jpeg(picture(1)[:4]))  # 64 x 4 pixels
    bounds = ("min_side", "max_aspect", "min_contrast", "min_entropy", "min_sharpness")
    changes = [word for name in bounds for word in ("--set", f"quality.{name}=null")]
    words = ("filter", tmp_path / "in", "--filters", "quality", *changes, "--out", tmp_path / "o")
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.exception
    row = Dataset.open(str(tmp_path / "o")).read().to_pylist()[0]
    assert (row["keep"], row["short_side"], row["aspect"]) == (True, 4, 16)


def test_pretrain__two_configs_are_refused():
    line = error_of("pretrain", "tiny", "--config", "vits14", "--data", "x", "--out", "o")
    assert "give one of them" in line


@dataclass(frozen=True)
class Pair:
    left: int = 1
    right: int = 2


def test_spelled_out__a_group_of_options_stands_for_its_fields():
    def body(name: str, pair: Pair = Pair(), last: bool = False) -> None:
        """Say what came."""
        heard.append((name, pair, last))

    heard = []
    command = spelled_out(body)
    assert list(inspect.signature(command).parameters) == ["name", "left", "right", "last"]
    assert command.__doc__ == body.__doc__
    command(name="a", left=3, right=4, last=True)
    assert heard == [("a", Pair(3, 4), True)]
