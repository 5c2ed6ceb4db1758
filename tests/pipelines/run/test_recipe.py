import pytest

from curation.errors import ConfigError
from pipelines.run.recipe import expected_counts, load_recipe

SMALL = """
name: small
sets:
  seeds: {images: /data/seeds}
  bench: {images: /data/bench}
pool:
  - ingest: {images: "${work}/images"}
  - canonicalize
  - embed: {encoders: {copy: lite-copy}}
  - near_dedup: {embeddings: copy}
  - leaks: {embeddings: copy, against: [bench]}
  - select: {as_is: [seeds]}
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def load(tmp_path, text, changes=()):
    return load_recipe(write(tmp_path, text), {"work": "/w"}, changes)


def test_load_recipe__builds_stages_and_roles(tmp_path):
    checked = load(tmp_path, SMALL, ["seed=7"])
    names = [stage.name() for stage in checked.stages]
    assert names == ["ingest", "canonicalize", "embed", "near_dedup", "leaks", "select"]
    assert checked.recipe.seed == 7
    assert checked.stages[0].images == "/w/images"
    assert checked.benchmarks() == ["bench"]
    assert [s.name() for s in checked.set_stages("bench")] == ["ingest", "canonicalize", "embed"]
    assert [s.name() for s in checked.set_stages("seeds")][-1] == "leaks"


WRONG = [
    ("pool:", "polo:", "unknown key 'polo'; did you mean 'pool'"),
    ("- canonicalize", "- canonicalise", "no stage 'canonicalise'; did you mean 'canonicalize'"),
    (
        "- canonicalize",
        "- canonicalize: {max_sid: 3}",
        "unknown key 'max_sid'; did you mean 'max_side'",
    ),
    ("- canonicalize", '- canonicalize: {max_side: "3"}', "'max_side' is \"3\""),
    ("- canonicalize", "", "stage 'embed' needs the column 'image', which no stage before it"),
    ("near_dedup: {embeddings: copy}", "near_dedup: {embeddings: kopy}", "embeddings 'kopy'"),
    ("against: [bench]", "against: [bunch]", "names the set 'bunch'; did you mean 'bench'"),
    ("${work}", "${wrok}", "has no value; did you mean 'work'"),
    ('- ingest: {images: "${work}/images"}', "", "the first stage must be 'ingest'"),
    ("name: small", "name: small\nseed: 1e-4", "write 1.0e-4"),
    ("name: small", "name: [", "not valid YAML"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_load_recipe__wrong_input_is_one_clear_line(tmp_path, old, new, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, SMALL.replace(old, new))
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_load_recipe__missing_file_names_those_that_ship():
    with pytest.raises(ConfigError, match="one of configs/recipes: demo, lvd142m"):
        load_recipe("dmo", {})


def test_lvd142m__adds_up_to_the_papers_total():
    """SPEC A.3, Table 15: 27 rows, 142,109,386 images."""
    counts = expected_counts(load_recipe("lvd142m", {}))
    assert len(counts) == 27
    assert counts["imagenet1k_train sample"] == 40_997_344
    assert counts["amstertime_new cluster"] == 960_000
    assert sum(counts.values()) == 142_109_386


@pytest.mark.parametrize("change", ["seed", "seed=[", "name.x=1"])
def test_load_recipe__wrong_change_is_one_clear_line(tmp_path, change):
    with pytest.raises(ConfigError, match=r"--set \S+: ") as error:
        load(tmp_path, SMALL, [change])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("name=../../evil", "'name' is \"../../evil\": a name is 1 to 64 letters"),
        ("name=''", "a name is 1 to 64 letters"),
        ("sets={../../evil: {images: x}}", "a name is 1 to 64 letters"),
        ("sets={a/b: {images: x}}", "a name is 1 to 64 letters"),
        ("pool=[{embed: {encoders: {../x: lite-copy}}}]", "a name is 1 to 64 letters"),
        ("seed=-1", "'seed' is -1"),
        ("seed=99999999999999999999999999", "'seed' is 99999999999999999999999999"),
        ("rows_per_shard=0", "'rows_per_shard' is 0"),
    ],
)
def test_load_recipe__names_and_numbers_have_bounds(change, what):
    with pytest.raises(ConfigError) as error:
        load_recipe("demo", {"work": "w"}, [change])
    assert what in str(error.value)
