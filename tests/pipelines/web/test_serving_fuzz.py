"""Every parameter of the server's own OpenAPI, fuzzed: no 500, and answers as it promises."""

from urllib.parse import quote

import httpx
import pyarrow.parquet as pq
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pipelines.web.serving.catalog import Catalog
from tests.pipelines.served_run import catalog_with_marks, served, serving
from tests.pipelines.web.test_threshold_lab import app_with_lab

CHECKS = [
    *(not_a_server_error, content_type_conformance),
    *(response_schema_conformance, status_code_conformance),
]


@pytest.fixture(scope="module")
def url():
    with served() as site:
        yield site.url


def test_api__any_parameters(url):
    """Valid and invalid ones of every route."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    strategies = [
        found.ok().as_strategy(generation_mode=mode)
        for found in schema.get_all_operations()
        for mode in modes
        if mode is GenerationMode.POSITIVE or list(found.ok().iter_parameters())
    ]
    assert len(strategies) == 2 * 14 - 1
    for strategy in strategies:
        _call(strategy)


def test_lab__any_parameters(tmp_path):
    """Its page, and the one route that writes: answers are rows, and nothing else."""
    answers = tmp_path / "answers.parquet"
    with serving(app_with_lab(tmp_path, str(answers))) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        found = [one.ok() for one in schema.get_all_operations()]
        mine = [one for one in found if one.path.startswith("/calibrate")]
        assert [one.method for one in mine] == ["get", "post"]
        for operation in mine:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _call(operation.as_strategy(generation_mode=mode))
        for number in ("0", "-1", "1e3", "0%2f..%2f..", "999999999", "\u0660"):
            for answer in ("yes", "maybe", "..%2fyes", "yes\x00"):
                status = httpx.post(f"{url}/calibrate/{quote(number)}/{quote(answer)}").status_code
                assert status == 303 if (number, answer) == ("0", "yes") else status in (404, 422)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.parquet", "catalog.duckdb"]
    assert set(pq.read_table(answers)["positive"].to_pylist()) <= {True, False, None}


def _call(strategy):
    @settings(
        max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @seed(0)
    @given(case=strategy)
    def call(case):
        case.call_and_validate(checks=CHECKS)

    call()


ATTACKS = [
    "' or 1=1 --",
    "kept'; drop table images; --",
    '" union select json from facts --',
    "read_csv('/etc/passwd')",
    "../../../../etc/passwd",
    "%2e%2e%2f%00",
    "\x00",
    "\ud7ff\ufffd",
    "${jndi:x}",
    "{{ 7 * 7 }}",
]
TEXTS = ("flow", "stage", "reason", "host", "source_set", "seed_set", "format", "component")


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts__are_looked_for_as_they_are(url, attack):
    """Whatever a text holds, it is a value that no row has; the catalog is as it was."""
    with httpx.Client(base_url=url) as client:
        for name in TEXTS:
            for path in ("/api/images", "/images"):
                answer = client.get(path, params={name: attack})
                assert answer.status_code == 200, (name, answer.text)
                assert "root:" not in answer.text
            assert client.get("/api/images", params={name: attack}).json()["rows"] == []
        refused = client.get("/api/images", params={"score": attack, "order": "lowest"})
        assert refused.status_code == 422
        assert client.get(f"/pictures/{attack.encode().hex()}/{'0' * 32}").status_code == 404
    with Catalog(catalog_with_marks()[0]) as catalog:
        assert catalog.size() == 40
