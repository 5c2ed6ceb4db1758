from curation.fetching.outcomes import (
    OPTED_OUT,
    PERMANENT,
    REASONS,
    TEMPORARY,
    FetchError,
    http_reason,
    status_of,
)
from embedder.images import REASONS as IMAGE_REASONS


def test_reasons__every_status_code_has_one():
    assert {http_reason(status) for status in (*range(100, 700), 999)} <= set(REASONS)
    assert [http_reason(status) for status in (404, 499, 503, 599, 302, 999)] == [
        *("http_404", "http_4xx", "http_503", "http_5xx", "http_3xx", "http_other")
    ]


def test_reasons__are_temporary_or_permanent_not_both():
    assert set(TEMPORARY).isdisjoint({*PERMANENT, *OPTED_OUT})
    assert FetchError("http_503").is_temporary
    assert FetchError("http_429").is_temporary
    assert not FetchError("http_404").is_temporary
    final = (401, 403, 404, 410, 451, 499, 501, 505, 506, 510, 600, 999)
    assert not any(FetchError(http_reason(status)).is_temporary for status in final)
    passing = (408, 425, 429, 500, 502, 503, 504, 507, 508, 511, 520, 530, 599)
    assert all(FetchError(http_reason(status)).is_temporary for status in passing)
    assert set(IMAGE_REASONS) <= set(REASONS)


def test_status_of__opt_outs_are_no_failures():
    assert [status_of(reason) for reason in (None, "opted_out:noai", "timeout")] == [
        *("arrived", "opted_out", "failed")
    ]
