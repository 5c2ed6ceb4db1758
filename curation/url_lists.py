"""Lists of domains and URLs that rows may not come from, or must come from.

Millions of entries take eight bytes each: a list is a sorted array of hashes, and a URL asks for
its host, the domains above it and the beginnings of its path.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field

from curation import storage
from curation.config import Settings
from curation.digest import digest_of
from curation.errors import ConfigError
from curation.identity import normalize_url
from curation.unpacking import PACKED_SUFFIXES, text_lines
from curation.url_entries import entries_of, host_and_path

logger = logging.getLogger(__name__)

_CATEGORY_FILES = ("domains", "urls")
_MAX_SEGMENTS = 32


class UrlLists(Settings):
    """Which URLs pass.

    A list is a file with an entry a line, or a folder with a folder a category, each with `domains`
    and `urls` (as UT1's blacklists are). `example.org` stands for the domain and all below it,
    `*.example.org` for those below it only, `example.org/path` for that and all below it. Hosts
    files, dnsmasq's lists and AdBlock's rules of whole domains are read, too.
    """

    schemes: tuple[Literal["http", "https"], ...] = Field(("http", "https"), min_length=1)
    """Schemes that pass."""
    blocked: dict[str, str] = {}
    """Name of a list -> file or folder: what is on one is dropped as url_list:NAME (for folders
    url_list:NAME/CATEGORY)."""
    categories: tuple[str, ...] = ()
    """Categories of the folders that count; none named: all."""
    allowed: dict[str, str] = {}
    """Lists of which a URL must be on one; empty: any URL passes."""
    pages: bool = True
    """Whether the page that showed an image is held against the blocked lists, too."""

    def fingerprint(self) -> str:
        """Digest of what changes when a list does: the files' sizes and times."""
        files = [file for _, file in _list_files(self.blocked, self.categories)]
        files += [file for _, file in _list_files(self.allowed, self.categories)]
        return digest_of([(file, storage.stamp_of(file)) for file in files])

    def judge(self, urls: Sequence[str], pages: Sequence[str | None]) -> list[str]:
        """For each normalized URL the reason why it may not pass, or "".

        Raises:
            ConfigError: a list is no list; names the file and the line.
        """
        state = self.fingerprint()
        blocked = _load(tuple(self.blocked.items()), self.categories, state)
        allowed = _load(tuple(self.allowed.items()), self.categories, state)
        listed = blocked.find(urls)
        asks_pages = self.pages and len(blocked.keys) > 0
        known = [_normal(page) if page and asks_pages else "" for page in pages]
        shown = blocked.find(known)
        passes = allowed.find(urls)
        out = []
        for url, own, page, allowing in zip(urls, listed, shown, passes, strict=True):
            if url.partition(":")[0] not in self.schemes:
                out.append("scheme")
            elif own is not None or page is not None:
                out.append(f"url_list:{own if own is not None else page}")
            else:
                out.append("not_allowed" if self.allowed and allowing is None else "")
        return out


@dataclass(frozen=True)
class UrlIndex:
    """The entries of some lists, ready to be asked."""

    names: tuple[str, ...]
    keys: np.ndarray
    """(M,) uint64 hashes of entries, sorted."""
    lists: np.ndarray
    """(M,) uint16: which list an entry is from; of equal entries the first list stays."""
    has_paths: bool
    """Whether any entry is more than a domain."""

    def find(self, urls: Sequence[str]) -> list[str | None]:
        """For each URL the name of the first list that holds it, or None."""
        found: list[str | None] = [None] * len(urls)
        if len(self.keys) == 0:
            return found
        hosts: dict[str, list[int]] = {}
        asked, rows = [], []
        for row, url in enumerate(urls):
            host, path = host_and_path(url)
            if host not in hosts:
                hosts[host] = [_key(text) for text in _domains_over(host)]
            keys = hosts[host]
            if self.has_paths:
                keys = [*keys, *(_key(text) for text in _beginnings(host, path))]
            asked += keys
            rows += [row] * len(keys)
        for row, which in self._look_up(np.array(asked, np.uint64), np.array(rows, np.int64)):
            found[row] = self.names[which]
        return found

    def _look_up(self, keys: np.ndarray, rows: np.ndarray) -> Iterable[tuple[int, int]]:
        """Rows that are listed, each with the smallest number of a list that holds it, last."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        hit = self.keys[places] == keys
        rows, lists = rows[hit], self.lists[places[hit]]
        order = np.argsort(-lists.astype(np.int64), kind="stable")
        return zip(rows[order].tolist(), lists[order].tolist(), strict=True)


def _domains_over(host: str) -> Iterator[str]:
    """The entries that would stand for a host: itself, each domain above it, and wildcards."""
    yield host
    while "." in host:
        host = host.partition(".")[2]
        yield host
        yield f"*.{host}"


def _beginnings(host: str, path: str) -> Iterator[str]:
    """The entries that would stand for a URL: its own text, and the paths above it."""
    plain = path.partition("?")[0]
    ends = [index for index, char in enumerate(plain) if char == "/"][1 : _MAX_SEGMENTS + 1]
    paths = dict.fromkeys([path.rstrip("/"), plain.rstrip("/"), *(plain[:end] for end in ends)])
    for name in {host, host.removeprefix("www.")}:
        yield from (name + one for one in paths if one)


def _key(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# --- reading lists ------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _load(lists: tuple[tuple[str, str], ...], categories: tuple[str, ...], state: str) -> UrlIndex:
    """Read lists; once a process, which asks them for piece after piece.

    state: what changes when a file does.
    """
    raw, origins, names = bytearray(), [], []
    has_paths = False
    for name, file in _list_files(dict(lists), categories):
        if name not in names:
            names.append(name)
        before = len(raw)
        for entry in _entries(file):
            has_paths |= "/" in entry
            raw += _key(entry).to_bytes(8, "little")
        if len(raw) == before and name in dict(lists):  # of a folder's files many are empty
            logger.warning("%s: has no entries", file)
        origins.append(np.full((len(raw) - before) // 8, names.index(name), np.uint16))
    keys = np.frombuffer(bytes(raw), "<u8")
    # Stable, so that of equal entries the one from the first list comes first, and stays.
    order = np.argsort(keys, kind="stable")
    keys, origin = keys[order], np.concatenate([*origins, np.zeros(0, np.uint16)])[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return UrlIndex(tuple(names), keys[first], origin[first], has_paths)


def _list_files(lists: dict[str, str], categories: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, file) of each list, in order.

    Raises:
        ConfigError: nothing there that is a list.
    """
    out = []
    for name, path in lists.items():
        found = _categories(path)
        if not found:
            if not storage.exists(path):
                raise ConfigError(f"{path}: no such list of domains or URLs")
            out.append((name, path))
            continue
        unknown = set(categories) - {category for category, _ in found}
        if unknown:
            raise ConfigError(
                f"{path}: no category '{min(unknown)}'; there are: "
                f"{', '.join(sorted({category for category, _ in found}))}"
            )
        wanted = [one for one in found if not categories or one[0] in categories]
        out += [(f"{name}/{category}", file) for category, file in wanted]
    return out


def _categories(path: str) -> list[tuple[str, str]]:
    """(category, file) of the lists in a folder; empty for a file."""
    out = []
    for relative in storage.walk_files(path):
        folder, _, name = relative.rpartition("/")
        for suffix in PACKED_SUFFIXES:
            name = name.removesuffix(suffix)
        if folder and name in _CATEGORY_FILES:
            out.append((folder, storage.join(path, relative)))
    return out


def _entries(path: str) -> Iterator[str]:
    """The entries of a list in the form that is looked up."""
    for number, line in text_lines(path):
        yield from entries_of(line, f"{path}: line {number}")


@lru_cache(maxsize=1 << 14)
def _normal(page: str) -> str:
    try:
        return normalize_url(page)
    except ValueError:
        return ""
