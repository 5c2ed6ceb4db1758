"""Images that a web page shows: URLs from `<img>` and `<picture>`, resolved against the page.

Pages are foreign bytes: whatever they hold, a list of images comes back, of bounded size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from curation.errors import ConfigError

MAX_PAGE_BYTES = 2 << 20
"""The rest of a longer page is not read: HTML can be written so that parsing is quadratic."""
MAX_IMAGES = 2000
"""Of one page."""
_MAX_URL = 8192
_MAX_ALT = 2048

_LAZY_SOURCE = re.compile(
    r"data-(?:[a-z0-9-]+-)?(?:src|source|original|lazy|lazyload|url|image|img|echo|full|large|hires)"
    r"(?:-[a-z0-9]+)?"
)
_LAZY_SRCSET = re.compile(r"data-(?:[a-z0-9-]+-)?(?:srcset|original-set)")
_GAP = re.compile(r"[\s,]*")
_WORD = re.compile(r"\S*")
_DESCRIPTORS = re.compile(r"[^,(]*(?:\([^)]*\)?[^,(]*)*")
_SPACES = re.compile(r"[\t\n\r]")


@dataclass(frozen=True)
class PageImage:
    """An image that a page shows."""

    url: str
    alt: str | None = None


def images_of_html(page: bytes, url: str, encoding: str | None = None) -> list[PageImage]:
    """Images of an HTML page, each URL once, in the order of the page.

    url: of the page. encoding: what the server says; else what the page says, or looks like.

    Raises:
        ConfigError: the package that parses HTML is not installed.
    """
    try:
        from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
        from resiliparse.parse.html import HTMLTree
    except ImportError as error:
        raise missing_extra(error) from error
    page = page[:MAX_PAGE_BYTES]
    known = map_encoding_to_html5(encoding) if encoding else None
    known = known or detect_encoding(page, from_html_meta=True) or "utf-8"
    tree = HTMLTree.parse_from_bytes(page, known)
    if tree.document is None:
        return []
    base = tree.document.query_selector("base[href]")
    root = base_url(url, None if base is None else base.getattr("href"))
    found: dict[str, PageImage] = {}
    waiting: list[str] = []  # links of a picture's sources: its <img> comes last, and has the text
    # values(): a loop over the collection itself searches the whole page for each step.
    for element in tree.document.query_selector_all("img, picture > source").values():
        waiting += _links(element)
        if element.tag == "img":
            _add_all(found, root, waiting, element.getattr("alt"))
            waiting = []
        if len(found) >= MAX_IMAGES:
            break
    _add_all(found, root, waiting, None)
    return list(found.values())


def _add_all(found: dict[str, PageImage], base: str, links: list[str], alt: str | None) -> None:
    for link in links:
        add_image(found, base, link, alt)


def base_url(page: str, href: str | None) -> str:
    """What the links of a page are resolved against: its `<base href>`, or its own URL."""
    return _resolve(page, href or "") or page


def add_image(found: dict[str, PageImage], base: str, link: str, alt: str | None) -> None:
    """Add a link of a page if it leads to http(s) and there is room for it.

    The first alternative text of a URL stays.
    """
    url = _resolve(base, link)
    known = found.get(url or "")
    if url is None or (known is None and len(found) >= MAX_IMAGES):
        return
    if known is None or (known.alt is None and alt):
        found[url] = PageImage(url, _clean(alt or "").strip()[:_MAX_ALT] or None)


def srcset_urls(text: str) -> list[str]:
    """URLs of a srcset, as HTML's standard reads it; they may hold commas themselves."""
    urls, position = [], 0
    while (position := _GAP.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        word = _WORD.match(text, position)
        assert word is not None, "matches anything"
        urls.append(word.group().rstrip(","))
        position = word.end()
        if not word.group().endswith(","):  # else no width or density follows
            position = _DESCRIPTORS.match(text, position).end()  # type: ignore[union-attr]
    return urls


def missing_extra(error: ImportError) -> ConfigError:
    """What to say where the packages that read web archives are not installed."""
    return ConfigError(
        f"web archives need the package '{error.name}', which is not installed; run: "
        "pip install 'lvd-curate[warc]'"
    )


def _links(element: Any) -> Iterator[str]:
    """Everything in the attributes of one element that may be an image's URL."""
    is_image = element.tag == "img"
    for name in element.attrs:
        value = element.getattr(name)
        if not value:
            continue
        if name == "srcset" or _LAZY_SRCSET.fullmatch(name):
            yield from srcset_urls(value)
        elif is_image and (name == "src" or (_LAZY_SOURCE.fullmatch(name) and _looks_like(value))):
            yield value


def _looks_like(value: str) -> bool:
    """Whether the value of a data attribute may be a URL: others hold flags, numbers and JSON."""
    return ("/" in value or "." in value) and not any(c in value for c in " {}<>|")


def _resolve(base: str, link: str) -> str | None:
    """The absolute http(s) URL of a link; None for data:, scripts, nonsense and overlong ones."""
    link = _SPACES.sub("", _clean(link).strip())
    if not link or len(link) > _MAX_URL or link.startswith("#"):
        return None
    try:
        url = urljoin(base, link)
    except ValueError:
        return None
    scheme = url.partition(":")[0].lower()
    return url if scheme in ("http", "https") and len(url) <= _MAX_URL else None


def _clean(text: str) -> str:
    """Without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
