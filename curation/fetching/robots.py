"""robots.txt as RFC 9309 has it: groups by product token, the longest match decides."""

import codecs
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote

from curation.fetching.connections import Head
from curation.fetching.content_codings import codings_in, is_gzip, unpack
from curation.fetching.outcomes import FetchError

MAX_BYTES = 500 << 10
"""RFC 9309 section 2.5: at least 500 KiB are read; the rest is ignored."""
_MAX_UNPACKED_BYTES = 20 << 20


@dataclass(frozen=True)
class RobotsRules:
    """The rules of one robots.txt that hold for one crawler."""

    rules: tuple[tuple[str, bool], ...] = ()
    """(path pattern, whether it allows)."""

    @classmethod
    def parse(cls, text: str, user_agent: str) -> "RobotsRules":
        """Merge the groups that name the crawler's product token; without any, those of "*"."""
        token = product_token(user_agent)
        named: list[tuple[str, bool]] = []
        default: list[tuple[str, bool]] = []
        is_named = False
        for agents, rules in _groups(text):
            if token in agents:
                is_named = True
                named.extend(rules)
            elif "*" in agents:
                default.extend(rules)
        return cls(tuple(named if is_named else default))

    @classmethod
    def disallow_all(cls) -> "RobotsRules":
        """Rules that allow nothing."""
        return cls((("/", False),))

    def allows(self, path: str) -> bool:
        """Whether a path (with its query) may be fetched; of equally long rules, allow wins."""
        if not self.rules or path == "/robots.txt":
            return True
        path = _normalized(path)
        best = (-1, True)
        for pattern, allow in self.rules:
            if _matches(pattern, path):
                best = max(best, (len(pattern), allow))
        return best[1]


def read_robots(head: Head, parts: Iterable[bytes]) -> str:
    """Text of a robots.txt: UTF-8, or what a byte order mark says; packed ones are unpacked.

    Raises:
        FetchError: it is cut, damaged or no text.
    """
    body = io.BytesIO()
    for part in parts:
        body.write(part)
        if body.tell() > MAX_BYTES:
            break
    codings = codings_in(head.get_all(b"content-encoding"))
    data = unpack(body.getvalue(), codings, _MAX_UNPACKED_BYTES)
    if is_gzip(data):  # a file of that kind, sent without a word about it
        data = unpack(data, ["gzip"], _MAX_UNPACKED_BYTES)
    text = data[:MAX_BYTES].decode(_charset_of(data), "replace")
    if "\0" in text:
        raise FetchError("bad_response")
    return text


def _charset_of(data: bytes) -> str:
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8"


def product_token(user_agent: str) -> str:
    """The leading letters, hyphens and underscores of a user agent, in lower case."""
    found = re.match(r"[A-Za-z_-]+", user_agent)
    return found.group().lower() if found else ""


def _groups(text: str) -> list[tuple[set[str], list[tuple[str, bool]]]]:
    groups: list[tuple[set[str], list[tuple[str, bool]]]] = []
    in_agents = False
    for line in re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")):
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            if not in_agents:
                groups.append((set(), []))
            groups[-1][0].add("*" if value == "*" else product_token(value))
            in_agents = True
        elif key in ("allow", "disallow"):
            in_agents = False
            if groups and value:  # an empty disallow allows all
                groups[-1][1].append((_normalized(value), key == "allow"))
    return groups


def _normalized(path: str) -> str:
    """One spelling of escapes; escaped reserved characters stay escaped."""
    parts = re.split(r"(%[0-9A-Fa-f]{2})", path)
    return "".join(_normalized_part(part) for part in parts)


def _normalized_part(part: str) -> str:
    if re.fullmatch(r"%[0-9A-Fa-f]{2}", part):
        char = unquote(part, "latin-1")
        return char if char.isascii() and (char.isalnum() or char in "-._~") else part.upper()
    return quote(part, safe="/?:@!$&'()*+,;=~-._")


def _matches(pattern: str, path: str) -> bool:
    """Match from the start; * is any characters, a $ at the end is the path's end.

    Pieces are searched from left to right: linear, whatever a hostile file holds.
    """
    ends = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    if not rest:
        return not ends or position == len(path)
    last = rest.pop() if ends else ""
    for piece in rest:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return not ends or (len(path) - len(last) >= position and path.endswith(last))
