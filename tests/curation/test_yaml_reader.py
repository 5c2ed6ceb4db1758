import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.config import apply_changes, check_name, find_config, read_mapping, read_yaml
from curation.errors import ConfigError
from curation.yaml_reader import parse_yaml

LAUGH = "a: &a [lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "k0: &k0 [x]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}]\n" for n in range(1, 2000))

REFUSED = {
    "billion laughs": (LAUGH, "line 6: its aliases stand for too many values"),
    "a chain of aliases": (CHAIN, "its aliases stand for too many values"),
    "itself": ("name: &n [*n]", "line 1: an alias stands inside of what it names"),
    "itself, below": ("a: 1\npool: &p\n  - x: {y: *p}", "line 3: an alias stands inside"),
    "itself as a key": ("&a {*a : 1}", "an alias stands inside"),
    "itself merged": ("&a\n<<: *a", "an alias stands inside"),
    "deep lists": ("[" * 5000, "line 1: is nested deeper than 50 levels"),
    "deep mappings": ("{a: " * 5000, "line 1: is nested deeper than 50 levels"),
    "deep lines": ("- " * 5000, "line 1: is nested deeper than 50 levels"),
    "many digits": (f"seed: {'9' * 5000}", "4300 digits"),
    "a key of digits": ("a: 1\n1: 2", "line 2: the key '1' is no text; put it in quotes"),
    "a key that YAML reads as false": ("no: 2", "the key 'no' is no text; put it in quotes"),
    "a key of nothing": ("? \n: 2", "the key '' is no text"),
    "a key of a list": ("? [a, b]\n: c", "the key a list or mapping is no text"),
    "a key twice": (
        "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3",
        "line 5: the key 'c' stands in line 3",
    ),
    "a raw NUL": ("a: \0", "special characters are not allowed"),
    "an escaped NUL": ('a: "b\\0"', "line 1: a text holds the character NUL"),
    "an object": ("!!python/object/apply:os.system [true]", "the tag 'python/object/apply:os"),
    "bytes": ("!!binary aGVsbG8=", "the tag 'binary' is not read"),
    "a set": ("!!set {a, b}", "the tag 'set' is not read"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: expected a single document"),
    "an unknown alias": ("a: *b", "line 1: found undefined alias"),
    "very long": ("a: 1\n" * 100_000, "is longer than 262,144 characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parse_yaml__refuses_in_one_line(name):
    text, what = REFUSED[name]
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "my.yaml")
    assert what in str(error.value)
    assert str(error.value).startswith("my.yaml: ")
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 5, "of the CPU, not of the clock"


def test_parse_yaml__plain_values_and_what_merges():
    found = parse_yaml("base: &b {a: 1, b: 2.5}\ntop: {<<: *b, a: 2, c: [~, yes, 'no']}", "my.yaml")
    assert found["base"] == {"a": 1, "b": 2.5}
    assert found["top"] == {"a": 2, "b": 2.5, "c": [None, True, "no"]}


def test_parse_yaml__dates_stay_texts():
    found = parse_yaml("a: 2020-01-01\n2021-13-45: 2001-12-14t21:59:43.10-05:00", "my.yaml")
    assert found == {"a": "2020-01-01", "2021-13-45": "2001-12-14t21:59:43.10-05:00"}


@given(st.text(alphabet="ab1: -[]{}&*!?<>|'\"\n#,\0", max_size=60))
def test_parse_yaml__any_text_is_a_value_or_one_line(text):
    said = ""
    try:
        parse_yaml(text, "my.yaml")
    except ConfigError as error:
        said = str(error)
    assert not said or (said.startswith("my.yaml: ") and "\n" not in said)


def test_read_yaml__no_file_at_all(tmp_path):
    for name in ("none.yaml", "n" * 5000 + ".yaml", "a\0b.yaml"):
        with pytest.raises(ConfigError, match="no such file"):
            read_yaml(tmp_path / name)
    with pytest.raises(ConfigError, match="neither a file nor one of configs/recipes"):
        find_config("recipes", "n" * 5000)


def test_read_mapping__lists_are_refused_and_nothing_is_empty(tmp_path):
    (tmp_path / "a.yaml").write_text("[a, b]")
    with pytest.raises(ConfigError, match="want a mapping of keys, found list"):
        read_mapping(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_mapping(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize("change", [f"{'a.' * 3000}a=1", f"a={'[' * 3000}", "a={b: 1, b: 2}"])
def test_apply_changes__the_same_reader(change):
    with pytest.raises(ConfigError) as error:
        apply_changes({}, [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "../../evil", "a b", "a\n", "ü", "a" * 65, "a\x1b"]
)
def test_check_name__refuses_what_is_no_name(name):
    with pytest.raises(ValueError, match="1 to 64 letters"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "in1k-val_2.0", "_x", "-x", "A" * 64])
def test_check_name__takes_names(name):
    assert check_name(name) == name
