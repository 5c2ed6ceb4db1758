import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.hostnames import ascii_host

BROWSERS = {
    "Example.COM.": "example.com",
    "straße.de": "xn--strae-oqa.de",
    "faß.de": "xn--fa-hia.de",
    "FAẞ.de": "xn--fa-hia.de",
    "βόλος.com": "xn--nxasmm1c.com",
    "ΒΌΛΟΣ.com": "xn--nxasmq6b.com",
    "bücher.example": "xn--bcher-kva.example",
    "XN--bcher-kva.example": "xn--bcher-kva.example",
    "b%C3%BCcher.example": "xn--bcher-kva.example",
    "ex%61mple.com": "example.com",
    "ｅｘａｍｐｌｅ。com": "example.com",
    "１２７.0.0.1": "127.0.0.1",
    "so\u00adft.de": "soft.de",
    "क्\u200cष.com": "xn--11b2ezcs70k.com",
    "نامه\u200cای.com": "xn--mgba3gch31f060k.com",
    "foo_bar.bücher.de": "foo_bar.xn--bcher-kva.de",
    "i❤.ws": "xn--i-7iq.ws",
    "💩.la": "xn--ls8h.la",
    "-a-.de": "-a-.de",
    "r3---sn-q4f.ü.com": "r3---sn-q4f.xn--tda.com",
}


@pytest.mark.parametrize("host", BROWSERS)
def test_ascii_host__as_browsers_have_it(host):
    assert ascii_host(host) == BROWSERS[host]


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            ".",
            "\u00ad",
            "a b.com",
            "a<b.com",
            "a%2Fb.com",
            "a%00b",
            "%zz",
            "%ff.de",
            "a％41.de",
        ),
        *("xn--a", "xn--", "xn--ü.de", "xn--abc.de", "a\u200cb.com", "a\u200db.com", "\u0301a.com"),
        *("אa.com", "\ue000.com"),
    ],
)
def test_ascii_host__what_no_browser_asks_for(host):
    with pytest.raises(ValueError, match=r"."):
        ascii_host(host)


@given(st.text(min_size=1, max_size=12))
def test_ascii_host__once_is_enough(host):
    try:
        once = ascii_host(host)
    except ValueError:
        return
    assert once.isascii()
    assert ascii_host(once) == once
