import pytest
from pydantic import ValidationError

from curation.neighbors.retrieval.seed_rule import SeedRule


def test_seed_rule__the_paper_s_numbers_unless_said_otherwise():
    rule = SeedRule(set="s", rule="cluster")
    assert (rule.k, rule.per_cluster, rule.min_hits, rule.cap) == (4, 10_000, 4, 1_000_000)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 10_001}, {"min_hits": 0}, {"rule": "nearest"}])
def test_seed_rule__numbers_that_cannot_be(wrong):
    with pytest.raises(ValidationError):
        SeedRule(**{"set": "s", "rule": "sample", **wrong})
