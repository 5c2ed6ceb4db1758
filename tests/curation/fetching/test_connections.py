import ssl

import h11
import pytest

from curation.fetching.connections import Head, _reason_of
from curation.fetching.outcomes import FetchError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FetchError("dns"), "dns"),
        (TimeoutError(), "timeout"),
        (ssl.SSLCertVerificationError(), "tls"),
        (ssl.SSLEOFError(), "connection"),
        (ConnectionResetError(), "connection"),
        (OSError(113, "no route"), "connection"),
        (h11.RemoteProtocolError("x"), "bad_response"),
        (h11.LocalProtocolError("x"), "bad_response"),
        (ValueError("x"), "bad_response"),
    ],
)
def test_reason_of__every_kind_of_error(error, reason):
    assert _reason_of(error) == reason


def test_head__fields_and_announced_length():
    head = Head(200, {b"a": [b"1", b"2"], b"b": [b"\xe9"], b"content-length": [b"7"]})
    assert head.get_all(b"a") == ["1", "2"]
    assert [head.get(b"b"), head.get(b"c"), head.body_bytes] == ["\xe9", None, 7]
    assert Head(200, {**head.fields, b"transfer-encoding": [b"chunked"]}).body_bytes is None
