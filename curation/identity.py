"""Row identity: how a source is normalized before it becomes an id.

The rules are part of the data: another rule gives other ids. They are versioned.
"""

import re
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit, urlunsplit

from curation.errors import ConfigError
from curation.hostnames import ascii_host

NORMALIZATION_VERSION = 2
SET_NAME_VERSION = 2
"""What a folder's set is called where nobody says: 1: "web"; 2: as the folder itself."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_SAFE_PATH = "/:@!$&'()*+,;=~-._"
_SAFE_QUERY = _SAFE_PATH + "?"
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
_PLAIN = re.compile(r"[A-Za-z0-9/:@!$&'()*+,;=~._-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_LENGTH = 8192


def normalize_url(url: str) -> str:
    """Give a URL's normal form (RFC 3986 section 6.2.2 and 6.2.3, without a fragment).

    Scheme and host in lower case, international hosts as browsers have them (UTS 46, not
    transitional), no default port, dot segments removed, an empty path as "/", escapes in upper
    case and only where they are needed.

    Raises:
        ValueError: not an http(s) URL with a host; says why.
    """
    url = url.strip()
    if not url or len(url) > _MAX_LENGTH or _CONTROL.search(url):
        raise ValueError("empty, too long, or with control characters")
    parts = urlsplit(url)
    if parts.scheme.lower() not in _DEFAULT_PORTS:
        raise ValueError(f"scheme '{parts.scheme}' is not http or https")
    path = _remove_dots(_escape(parts.path, _SAFE_PATH)) or "/"
    query = _escape(parts.query, _SAFE_QUERY)
    return urlunsplit((parts.scheme.lower(), _authority(parts), path, query, ""))


def file_source(set_name: str, relative_path: str) -> str:
    """What the id of a file is made from: its set's name and its path below the set's root."""
    return f"{set_name}/{relative_path.replace(chr(92), '/').lstrip('/')}"


def set_name_of(path: str) -> str:
    """The set that a folder or file of images is, where nobody names it: its own last name.

    However a folder is written, with links, dots or slashes at its end, its set is the same.

    Raises:
        ConfigError: it has no name, as the root has none.
    """
    local = path.removeprefix("file://")
    whole = path if "://" in local else Path(local).resolve().as_posix()
    return checked_set_name(whole.rstrip("/").rpartition("/")[2], "--set-name")


def checked_set_name(name: str, where: str) -> str:
    """Give a name that can be part of ids and of paths, as it is.

    Raises:
        ConfigError: it is empty, leads elsewhere, or holds slashes or control characters.
    """
    if name in ("", ".", "..") or any(char in "/\\" or not char.isprintable() for char in name):
        raise ConfigError(
            f"{where}: {name!a} cannot name a set; give a name without slashes, such as photos"
        )
    return name


def _authority(parts: SplitResult) -> str:
    port = parts.port
    shown = "" if port in (None, _DEFAULT_PORTS[parts.scheme.lower()]) else f":{port}"
    user, at, place = parts.netloc.rpartition("@")
    if place.startswith("["):
        return f"{user}{at}[{parts.hostname}]{shown}"
    host = place.partition(":")[0]  # not `hostname`: Python's lower case knows the final sigma
    if not host:
        raise ValueError("no host")
    return f"{user}{at}{ascii_host(host)}{shown}"


def _escape(text: str, safe: str) -> str:
    """Escape what must be, unescape what need not be, and keep escaped reserved characters."""
    if _PLAIN.fullmatch(text):
        return text
    out = []
    position = 0
    raw = text.encode()
    for match in _ESCAPED.finditer(raw):
        out.append(quote(raw[position : match.start()], safe))
        char = unquote_to_bytes(match.group())
        plain = char.isalnum() or char in b"-._~"
        out.append(char.decode("latin-1") if plain else f"%{match.group(1).decode().upper()}")
        position = match.end()
    out.append(quote(raw[position:], safe))
    return "".join(out)


def _remove_dots(path: str) -> str:
    """RFC 3986 section 5.2.4."""
    if "/." not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments[1:]:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    tail = "/" if segments[-1] in (".", "..") and kept else ""
    return "/" + "/".join(kept) + tail
