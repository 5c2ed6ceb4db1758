import numpy as np
import pytest

from curation.neighbors.dedup import component_rules
from curation.neighbors.dedup.component_rules import COMPONENT_RULES
from curation.neighbors.dedup.members import Members
from tests.curation.neighbors.dedup.conftest import THRESHOLD, crowd
from tests.curation.neighbors.dedup.test_members import gathered


@pytest.fixture
def members(made, tmp_path):
    one = made(crowd(0), crowd(0)[20:60] + np.float16(0.05))
    return one, Members.ordered(gathered(one, tmp_path, 1)[0], 1, one.graph.files)


def greedy(one, members, component):
    """In order: a row unless one kept before is within the threshold; published ones stay."""
    rows = list(range(component.start, component.stop))
    kept = [row for row in rows if members.published[row]]
    position = members["position"]
    for row in rows:
        near = (one.cosines[position[row], position[other]] > THRESHOLD for other in kept)
        if row not in kept and not any(near):
            kept.append(row)
    return kept


@pytest.mark.parametrize("block", [3, 256])
def test_representative__keeps_what_a_greedy_choice_keeps(members, monkeypatch, block):
    monkeypatch.setattr(component_rules, "_BLOCK", block)
    one, members = members
    keeps = COMPONENT_RULES["representative"].keeps(members, THRESHOLD)
    wanted = sorted(row for part in members.components() for row in greedy(one, members, part))
    assert np.flatnonzero(keeps).tolist() == wanted
    assert (members.sizes > 4).any()
    assert members.published.any()


def test_components__keeps_the_first_of_each(members):
    _, members = members
    keeps = COMPONENT_RULES["components"].keeps(members, THRESHOLD)
    assert np.flatnonzero(keeps).tolist() == members.bounds[:-1].tolist()


def test_rules__are_known_by_their_names():
    assert {name: rule.is_guarded for name, rule in COMPONENT_RULES.items()} == {
        "components": True,
        "representative": False,
    }
