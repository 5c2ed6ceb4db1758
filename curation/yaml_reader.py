"""Reads YAML that anybody may have written: plain values soon, or an error of one line."""

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from curation.errors import ConfigError

MAX_CHARACTERS = 1 << 18
_MAX_DEPTH = 50
_MAX_VALUES = 100_000
_YAML = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_YAML}str", f"{_YAML}merge"
_TAGS = {f"{_YAML}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document; `where` names its place in errors.

    Raises:
        ConfigError: it is no YAML, or more than settings ever hold.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: is longer than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        what = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{where}: not valid YAML: {line}{what}") from error
    except (yaml.YAMLError, ValueError) as error:  # a number of thousands of digits
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Weighs every value as it is composed, before any is built."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in some if tag != f"{_YAML}timestamp"]
        for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        self._weights: dict[int, tuple[int, int]] = {}
        """Node -> values in it, and how deep they lie."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a value, and refuse what is too much."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._open += 1
        if self._open > _MAX_DEPTH:
            raise _refused(f"is nested deeper than {_MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is not None and not isinstance(event, yaml.AliasEvent):
            _check(node)
            self._weights[id(node)] = self._weighed(node, event)
        if id(node) not in self._weights:
            raise _refused("an alias stands inside of what it names", event)
        return node

    def _weighed(self, node: Node, event: Any) -> tuple[int, int]:
        inner = [self._weights[id(one)] for one in _inside(node)]
        values = 1 + sum(count for count, _ in inner)
        depth = 1 + max((below for _, below in inner), default=0)
        if values > _MAX_VALUES or depth > _MAX_DEPTH:
            raise _refused("its aliases stand for too many values", event)
        return values, depth


def _inside(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [one for pair in node.value for one in pair]
    return node.value if isinstance(node, SequenceNode) else []


def _check(node: Node) -> None:
    """Refuse what settings never hold: other tags, NULs, keys that are no texts or stand twice."""
    if node.tag not in _TAGS and node.tag != _MERGE:
        raise _refused(f"the tag '{node.tag.removeprefix(_YAML)}' is not read", node)
    if isinstance(node, ScalarNode) and "\0" in node.value:
        raise _refused("a text holds the character NUL", node)
    seen: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, MappingNode) else []:
        if key.tag not in (_TEXT, _MERGE):
            shown = f"'{key.value}'" if isinstance(key, ScalarNode) else "a list or mapping"
            raise _refused(f"the key {shown} is no text; put it in quotes", key)
        if key.value in seen:
            raise _refused(f"the key '{key.value}' stands in line {seen[key.value]}, too", key)
        seen[key.value] = key.start_mark.line + 1


def _refused(problem: str, at: Any) -> ComposerError:
    return ComposerError(None, None, problem, at.start_mark)
