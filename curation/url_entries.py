"""The entries in lists of domains and URLs: plain, of hosts files, of dnsmasq, and of AdBlock.

What a line says is read where it says which URLs it means; all else is refused, so that no entry
stands there and matches nothing.
"""

import ipaddress
import re
from urllib.parse import urlsplit

from curation.errors import ConfigError
from curation.identity import normalize_url

_LABEL = r"(?!-)[a-z0-9_-]{1,63}"
_DOMAIN = re.compile(rf"(?:{_LABEL}\.)*(?=[^.]*[a-z]){_LABEL}")
_DNSMASQ = re.compile(r"(address|server|local)=/(.+)/([^/]*)")
_NOWHERE = ("", "#", "0.0.0.0", "127.0.0.1", "::", "::1")
"""Addresses that dnsmasq gives for names that shall not be reached."""
_ADBLOCK = re.compile(r"\|\|([^/^|$*]+)\^(?:\$(.+))?")
_EVERYWHERE = {"all", "image", "important"}
"""Options with which an AdBlock rule still means every image of a domain."""
_COSMETIC = re.compile(r"#[@?$%]*#")


def entries_of(line: str, where: str) -> list[str]:
    """The entries of a line in the form in which URLs are asked for; none of a comment.

    Raises:
        ConfigError: it is none of the forms; says where, and why where that helps.
    """
    if _DOMAIN.fullmatch(line):
        return [line]
    text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
    if not text or text.startswith("!") or re.fullmatch(r"\[[^:\]]*\]", text):
        return []
    try:
        return [_entry(name) for name in _names_in(text)]
    except ValueError as error:
        raise ConfigError(
            f"{where} is {text[:80]!r} ({error}); write a domain, *.domain, or a URL, one a line"
        ) from error


def host_and_path(url: str) -> tuple[str, str]:
    """The host of a URL, and its path with the query; empty of what is no URL."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.path + (f"?{parts.query}" if parts.query else "")
    except ValueError:
        return "", ""


def _names_in(text: str) -> list[str]:
    """The domains and URLs of a line.

    Raises:
        ValueError: it says something else than that these are listed.
    """
    if match := _DNSMASQ.fullmatch(text):
        kind, names, target = match.groups()
        if target not in (_NOWHERE if kind == "address" else ("",)):
            raise ValueError("it leads to another address")
        return names.split("/")
    if _COSMETIC.search(text):
        raise ValueError("it hides parts of pages")
    if text.startswith(("|", "@@")):
        return [_domain_of_rule(text)]
    *before, last = text.partition("#")[0].split()
    if before and not _is_address(before[0].partition("%")[0]):
        raise ValueError("the first of several words must be an IP address")
    return [*before[1:], last]


def _domain_of_rule(text: str) -> str:
    """The domain of an AdBlock rule that means all of it."""
    match = _ADBLOCK.fullmatch(text)
    if match is None or set((match[2] or "all").split(",")) - _EVERYWHERE:
        raise ValueError("of AdBlock's rules only ||domain^ can be read")
    return match[1]


def _entry(text: str) -> str:
    """Normal form of a domain, a wildcard or a URL.

    Raises:
        ValueError: it is none.
    """
    if _is_address(text):
        text = f"[{text}]" if ":" in text else text
    wildcard = "*." if text.startswith("*.") else ""
    text = text.removeprefix("*.").rpartition("://")[2].removeprefix(".")
    host, path = host_and_path(normalize_url(f"http://{text}"))
    path = path.rstrip("/")
    if not _is_address(host) and not _DOMAIN.fullmatch(host):
        raise ValueError(f"no domain is called {host[:80]!r}")
    if (wildcard and path) or (_is_address(host) and re.fullmatch(r"/\d{1,3}", path)):
        raise ValueError("neither wildcards with a path nor ranges of addresses can be read")
    return wildcard + host + path


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
