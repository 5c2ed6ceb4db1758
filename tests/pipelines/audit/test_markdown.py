import re

import pytest
import yaml

from pipelines.audit.card import card_text
from pipelines.audit.markdown import as_code, as_text
from pipelines.audit.model_card import _head, _in_quotes
from pipelines.audit.work_folder import WorkFolder
from tests.pipelines.audited_run import finished_run

HOSTILE = (
    "a`b``c <script>alert(1)</script>\n\n# Head | cell [link](javascript:x) ![i](x) *b* _i_ ~s~"
)


def test_as_text__holds_no_markup():
    shown = as_text(HOSTILE)
    assert "\n" not in shown
    assert "<" not in shown
    assert not re.search(r"(?<!\\)[`*_\[\]|~#]", shown)
    assert as_text("near_duplicate 1, leak:in1k-val 2") == "near_duplicate 1, leak:in1k-val 2"


@pytest.mark.parametrize("text", ["plain", "`", "a`b", "```", "", "<b>", "a\nb"])
def test_as_code__is_closed_by_its_own_fence_alone(text):
    shown = as_code(text)
    fence = re.match("`+", shown)[0]
    inner = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence)
    assert fence not in re.findall("`+", inner)
    assert "\n" not in shown


@pytest.mark.parametrize("text", ["cc-by-4.0", "a: b\n---\nevil: 1", "[x", "'", "&a *a", "# no"])
def test_head__is_one_text_of_yaml(text):
    assert yaml.safe_load(_head("license", text)) == {"license": " ".join(text.split())}


def test_in_quotes__stays_a_text_of_python():
    text = '"); import os; ("```\n'
    assert "```" not in _in_quotes(text)
    assert eval(f'"{_in_quotes(text)}"') == text


def test_card_text__sources_and_settings_are_shown_as_they_are():
    shown = card_text(WorkFolder(str(finished_run())))
    assert "<img" not in shown.replace("`", "")
    assert "# audited" in shown
