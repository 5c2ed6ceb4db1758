import io
import struct

import pytest
from PIL import Image

from embedder.errors import ImageError
from embedder.image_files import exif_orientation, parse_image


def exif_block(orientation: int, order: str = "<") -> bytes:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, 1) + entry + b"\0" * 4


def saved(format: str, size: tuple[int, int] = (8, 6), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation__both_byte_orders(order: str) -> None:
    assert exif_orientation(exif_block(6, order)) == 6


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"II*\0\xff\xff\xff\xff\0\0", exif_block(9)])
def test_exif_orientation__broken_is_upright(exif: bytes) -> None:
    assert exif_orientation(exif) == 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_parse_image__format_and_size(format: str) -> None:
    file = parse_image(saved(format))
    assert (file.format, file.width, file.height) == (format, 8, 6)
    assert file.is_whole


@pytest.mark.parametrize("options", [{"lossless": True}, {"exif": exif_block(1)}, {}])
def test_parse_image__all_kinds_of_webp(options: dict[str, object]) -> None:
    file = parse_image(saved("WEBP", (31, 17), **options))
    assert (file.width, file.height) == (31, 17)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_parse_image__orientation_and_profile(format: str) -> None:
    file = parse_image(saved(format, exif=exif_block(6), icc_profile=b"\0" * 200))
    assert file.orientation == 6
    assert file.icc == b"\0" * 200


def test_parse_image__jpeg_loses_metadata_thumbnails_and_trailers() -> None:
    plain = saved("JPEG")
    thumbnail = b"JFXX\0\x10SECRET"
    segments = b"".join(
        b"\xff" + bytes([marker]) + struct.pack(">H", len(payload) + 2) + payload
        for marker, payload in [
            (0xE0, thumbnail),
            (0xE1, b"SECRET"),
            (0xED, b"SECRET"),
            (0xFE, b"SECRET"),
        ]
    )
    loud = plain[:2] + segments + plain[2:] + b"SECRET"
    assert parse_image(loud).data == parse_image(plain).data == plain


def test_parse_image__profile_in_several_segments() -> None:
    profile = bytes(range(256)) * 600
    assert parse_image(saved("JPEG", icc_profile=profile)).icc == profile


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><svg></svg></html>", "not_an_image"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported_format"),
        (b"8BPS" + b"\0" * 30, "unsupported_format"),
        (b"\xff\xd8\xff", "truncated"),
        (saved("PNG")[:20], "truncated"),
        (saved("WEBP")[:18], "truncated"),
        (b"GIF89a", "truncated"),
    ],
)
def test_parse_image__refuses(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_image(data)
    assert caught.value.reason == reason


def test_parse_image__jpeg_with_endless_scans() -> None:
    plain = saved("JPEG", progressive=True)
    scan = plain[plain.index(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="more than 100 scans"):
        parse_image(plain[:-2] + scan * 100 + b"\xff\xd9")
