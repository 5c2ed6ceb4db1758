import hashlib
import json

import pytest

from curation.errors import DatasetError
from pipelines.audit.card import write_card
from pipelines.audit.work_folder import WorkFolder
from tests.pipelines.audited_run import finished_run


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    out = tmp_path_factory.mktemp("card")
    text, described = write_card(str(finished_run()), str(out))
    with open(text) as one, open(described) as other:  # noqa: PTH123
        return one.read(), json.load(other)


def test_write_card__tells_counts_sources_and_settings(card):
    text, _ = card
    assert "17 images, chosen from 30 listed" in text
    assert "| near_dedup | 27 | 0 | 1 | 26 | near_duplicate 1 |" in text
    assert "bench (leaks): 4 rows" in text
    assert '"min_side": 16' in text
    assert WorkFolder(str(finished_run())).manifest.manifest.content_digest in text


def test_write_card__names_encoders_with_the_license_of_their_weights(card):
    text, _ = card
    (line,) = [line for line in text.splitlines() if line.startswith("- copy: ")]
    assert line == "- copy: `lite-copy`, 768 dimensions; weights: none"


def test_write_card__croissant_names_files_and_columns(card):
    _, described = card
    manifest = WorkFolder(str(finished_run())).manifest
    (records,) = described["recordSet"]
    assert [field["name"] for field in records["field"]] == manifest.columns
    files = {one["name"]: one for one in described["distribution"]}
    for shard in manifest.manifest.shards:
        data = (finished_run() / "manifest" / shard.name).read_bytes()
        assert files[shard.name]["sha256"] == hashlib.sha256(data).hexdigest()
    known = {one["@id"] for one in described["distribution"]}
    assert {field["source"]["fileSet"]["@id"] for field in records["field"]} <= known


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib")
def test_write_card__valid_for_mlcroissant(card, tmp_path):
    croissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant: pip install it")
    path = tmp_path / "croissant.json"
    path.write_text(json.dumps(card[1]))
    croissant.Dataset(jsonld=str(path))


def test_write_card__no_run(tmp_path):
    with pytest.raises(DatasetError, match=r"no run\.json"):
        write_card(str(tmp_path), str(tmp_path))
