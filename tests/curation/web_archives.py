"""Small WARC and WAT files, each record a gzip member of its own, as crawlers write them."""

import gzip
import json


def record(kind: str, url: str, content_type: str, block: bytes, date: str) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: {date}\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def page(
    url: str,
    html: bytes,
    *,
    status: int = 200,
    kind: str = "text/html; charset=utf-8",
    headers: str = "",
    date: str = "2024-05-18T01:58:10Z",
) -> bytes:
    """A response with a page."""
    head = f"HTTP/1.1 {status} OK\r\nContent-Type: {kind}\r\n{headers}\r\n".encode()
    return record("response", url, "application/http; msgtype=response", head + html, date)


def wat(url: str, links: list[object], base: object = None) -> bytes:
    """Common Crawl's metadata of a page."""
    html = {"Head": {"Title": "T", "Base": base}, "Links": links}
    envelope = {"Envelope": {"Payload-Metadata": {"HTTP-Response-Metadata": {}}}}
    envelope["Envelope"]["Payload-Metadata"]["HTTP-Response-Metadata"] = {"HTML-Metadata": html}
    block = json.dumps(envelope).encode()
    return record("metadata", url, "application/json", block, "2024-05-18T01:58:10Z")


def info() -> bytes:
    return record("warcinfo", "", "application/warc-fields", b"software: test\r\n", "2024-05-18")


def packed(*records: bytes) -> list[bytes]:
    """The gzip members of a file."""
    return [gzip.compress(one, mtime=0) for one in records]
