"""Images that belong together, as the report and the server show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.audit.tables import Row
from pipelines.web.pictures import Key, Picture


@dataclass
class Shown:
    """One image of a group."""

    key: Key
    role: str = ""
    """What it is here: dropped, kept, seed."""
    facts: Row = field(default_factory=dict)


@dataclass
class Group:
    """Images that belong together: a pair, a component, a seed and its images."""

    items: list[Shown]
    title: str = ""
    note: str = ""
    kind: str = "set"
    """pair, seed or set."""


class Book(Protocol):
    """Holds pictures by key."""

    def get(self, key: Key) -> Picture:
        """The picture of a key."""


def pair_of(items: list[Shown], similarity: float | None, note: str = "") -> Group:
    """An image beside the one that it is compared with."""
    told = "" if similarity is None else f"similarity {similarity:.4f}"
    return Group(items, note=told + note, kind="pair")


def veil_together(groups: Sequence[Group], book: Book) -> None:
    """Treat copies alike: what is veiled or hidden in one image of a pair is so in the other."""
    for group in groups:
        if group.kind == "pair":
            both = [book.get(item.key) for item in group.items]
            for picture in both:
                picture.veiled = any(one.veiled for one in both)
                picture.hidden = any(one.hidden for one in both)


def rank_of(hit: Row) -> str:
    """The role of what a seed fetched."""
    return f"#{hit['rank']}" if hit.get("rank") is not None else ""


def rounded(facts: Mapping[str, object]) -> Row:
    """What is known of an image, without what is not, as captions show it."""
    known = {name: value for name, value in facts.items() if value is not None}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in known.items()}
