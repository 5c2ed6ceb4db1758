import pyarrow as pa
import pytest

from curation.dataset import commit, write_shard
from pipelines.audit.languages import TOO_SHORT, alt_languages, language_of

pytest.importorskip("py3langid")


def test_alt_languages__the_most_common_first(tmp_path):
    texts = ["a photo of a red house by the sea"] * 3 + [
        "ein Foto von einem roten Haus am Meer",
        "x",
    ]
    table = pa.table({"id": [f"{n:032x}" for n in range(7)], "alt": [*texts, None, ""]})
    dataset = commit(str(tmp_path), table.schema, [write_shard(str(tmp_path), 0, table)])
    found = alt_languages(dataset)
    assert [(row["language"], row["rows_of_sample"]) for row in found] == [
        ("en", 3),
        ("de", 1),
        (TOO_SHORT, 1),
    ]
    assert found[0]["share"] == 0.6
    assert alt_languages(None) == []


def test_language_of__too_few_letters():
    assert language_of("IMG_20240101_1234") == TOO_SHORT
