"""Names of hosts as browsers ask for them: the WHATWG URL standard, by UTS 46 and Punycode.

The `idna` package alone would refuse what browsers pass, such as underscores and emoji.
"""

import functools
import re
from urllib.parse import unquote

import idna

_FORBIDDEN = re.compile(r"[\x00-\x20#%/:<>?@\[\\\]^|\x7f]")
_JOINERS = "\u200c\u200d"


@functools.lru_cache(maxsize=4096)
def ascii_host(host: str) -> str:
    """Give a host's name in ASCII and lower case, without the dot of the root.

    straße.de is xn--strae-oqa.de, as in IDNA 2008, and not strasse.de, as in IDNA 2003.

    Raises:
        ValueError: no browser would ask for it.
    """
    if "%" in host:
        host = unquote(host, errors="strict")
    mapped = idna.uts46_remap(host, std3_rules=False)
    name = ".".join(map(_ascii_label, mapped.split("."))).rstrip(".")
    if not name or _FORBIDDEN.search(name):
        raise ValueError(f"'{host}' is no name of a host")
    return name


def _ascii_label(label: str) -> str:
    if label.startswith("xn--"):
        _check(label[4:].encode("ascii").decode("punycode"))
        return label
    if label.isascii():
        return label
    _check(label)
    return "xn--" + label.encode("punycode").decode("ascii")


def _check(label: str) -> None:
    """Criteria of UTS 46 section 4.1 that browsers check."""
    if label.isascii() or idna.uts46_remap(label, std3_rules=False) != label:
        raise ValueError(f"'{label}' is not in normal form")
    idna.check_initial_combiner(label)
    idna.check_bidi(label)
    for position, char in enumerate(label):
        if char in _JOINERS and not idna.valid_contextj(label, position):
            raise ValueError(f"a joiner stands alone in '{label}'")
