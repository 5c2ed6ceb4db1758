"""What an image file says about itself: format, size, orientation, profile; no pixel is decoded.

Foreign metadata never reaches the decoder: JPEG and PNG files are rebuilt from the segments that
carry pixels, so a text bomb or a broken EXIF block can neither fail nor slow the decoding, and the
size that was checked is the size that is decoded.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from embedder.errors import ImageError

MAX_ICC_BYTES = 4 << 20
MAX_JPEG_SCANS = 100
"""Each scan of a progressive JPEG costs a pass over all pixels; encoders write about ten."""


@dataclass(frozen=True)
class ImageFile:
    """An image file, parsed but not decoded."""

    format: str
    width: int
    """In pixels, as stored: before the orientation is applied."""
    height: int
    data: bytes = field(repr=False)
    """What the decoder is given; for JPEG the file without its metadata."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""
    icc: bytes | None = field(default=None, repr=False)
    num_channels: int | None = None
    """Stored color channels; known for JPEG only."""
    is_whole: bool = True
    """False where the file ends before its own structure does."""
    lacks_scans: bool = False
    """Whether a JPEG's scans leave out a component, or coefficients of one."""


def exif_orientation(exif: bytes) -> int:
    """Orientation tag of a TIFF-structured EXIF block; 1 where it is absent or broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", exif, 4)
    for tag, value in _exif_shorts(exif, order, start):
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1


def _exif_shorts(exif: bytes, order: str, start: int) -> Iterator[tuple[int, int]]:
    if start + 2 > len(exif):
        return
    (count,) = struct.unpack_from(order + "H", exif, start)
    for offset in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, offset)
        if kind == 3:
            yield tag, value


# --- JPEG ---------------------------------------------------------------------------------------

_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed zero nor a restart
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = frozenset({0xC0, 0xC1, 0xC9}), frozenset({0xC2, 0xCA})
_SOS, _EOI, _COM = 0xDA, 0xD9, 0xFE
_END = bytes([0xFF, _EOI])
_STANDALONE = frozenset({0x01, 0xD8})


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, payload) up to the end of the image; scan data follow as marker -1."""
    position = 2
    while found := _NEXT_MARKER.search(data, position):
        marker, position = data[found.start() + 1], found.end()
        if marker == _EOI:
            yield marker, b""
            return
        if marker in _STANDALONE:
            continue
        size = int.from_bytes(data[position : position + 2], "big")
        if size < 2 or position + size > len(data):
            return
        yield marker, data[position + 2 : position + size]
        position += size
        if marker == _SOS:
            after = _NEXT_MARKER.search(data, position)
            end = after.start() if after else len(data)
            yield -1, data[position:end]
            position = end


@dataclass
class _JpegParts:
    """What the walk over a JPEG's segments has gathered so far."""

    kept: list[bytes] = field(default_factory=lambda: [b"\xff\xd8"])
    frame: bytes | None = None
    frame_marker: int = 0
    orientation: int = 1
    profile: dict[int, bytes] = field(default_factory=dict)
    scans: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    def keep(self, marker: int, payload: bytes) -> None:
        size = struct.pack(">H", len(payload) + 2)
        self.kept.append(bytes([0xFF, marker]) + size + payload)

    def add(self, marker: int, payload: bytes) -> None:
        if marker == -1:
            self.kept.append(payload)
        elif marker == _EOI:
            self.is_whole = True
        elif 0xE0 <= marker <= 0xEF:
            self._add_application(marker, payload)
        elif marker != _COM:
            self._add_coding(marker, payload)

    def _add_application(self, marker: int, payload: bytes) -> None:
        if marker == 0xE0 and payload[:5] == b"JFIF\0" and len(payload) >= 14:
            self.keep(marker, payload[:12] + b"\0\0")  # its thumbnail may show what was cropped
        elif marker == 0xEE and payload[:5] == b"Adobe" and len(payload) >= 12:
            self.keep(marker, payload[:12])
        elif marker == 0xE1 and payload[:6] == b"Exif\0\0" and self.orientation == 1:
            self.orientation = exif_orientation(payload)
        elif marker == 0xE2 and payload[:12] == b"ICC_PROFILE\0" and len(payload) > 14:
            self.profile.setdefault(payload[12], payload[14:])

    def _add_coding(self, marker: int, payload: bytes) -> None:
        if marker in _START_OF_FRAME and self.frame is None:
            self.frame, self.frame_marker = payload, marker
        if marker == _SOS:
            self.scans.append(payload)
        self.keep(marker, payload)

    def lacks_scans(self) -> bool:
        """Whether the file could end after these scans, and yet lack some: they were cut off."""
        if self.frame_marker not in _SEQUENTIAL | _PROGRESSIVE or self.frame is None:
            return False
        left = {component: [True] * 64 for component in self.frame[6::3][: self.frame[5]]}
        for scan in self.scans:
            components, rest = scan[1:][: 2 * scan[0] : 2], scan[1 + 2 * scan[0] :]
            if len(rest) < 3 or not left.keys() >= set(components):
                return False  # the decoder shall say what is wrong with it
            first, last, low_bit = rest[0], rest[1], rest[2] & 15
            if self.frame_marker in _SEQUENTIAL:
                first, last, low_bit = 0, 63, 0
            for component in components:
                span = slice(first, last + 1)
                left[component][span] = [low_bit > 0] * len(left[component][span])
        return any(map(any, left.values()))


def parse_jpeg(data: bytes) -> ImageFile:
    """Parse a JPEG and rebuild it without metadata, profile, thumbnails and trailing bytes.

    One that lacks its last marker gets it: what else it lacks is seen when it is decoded.
    """
    parts = _JpegParts()
    for marker, payload in _jpeg_segments(data):
        parts.add(marker, payload)
        if len(parts.scans) > MAX_JPEG_SCANS:
            raise ImageError("decode_error", f"JPEG with more than {MAX_JPEG_SCANS} scans")
    if parts.frame is None or len(parts.frame) < 6:
        reason = "decode_error" if parts.is_whole else "truncated"
        raise ImageError(reason, "JPEG without a frame header")
    height, width, num_channels = struct.unpack_from(">HHB", parts.frame, 1)
    icc = b"".join(parts.profile[i] for i in sorted(parts.profile))
    return ImageFile(
        "JPEG",
        width,
        height,
        b"".join(parts.kept).rstrip(b"\xff") + _END,
        parts.orientation,
        icc or None,
        num_channels,
        parts.is_whole,
        parts.lacks_scans(),
    )


# --- PNG ----------------------------------------------------------------------------------------

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of each chunk; the end of the last may lie beyond the data."""
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end


def _png_profile(chunk: bytes) -> bytes | None:
    name, _, packed = chunk.partition(b"\0")
    if len(name) > 79 or not packed:
        return None
    try:
        return zlib.decompressobj().decompress(packed[1:], MAX_ICC_BYTES)
    except zlib.error:
        return None


def parse_png(data: bytes) -> ImageFile:
    """Parse a PNG and rebuild it from its pixel chunks (an APNG becomes its default image)."""
    if len(data) < 33:
        raise ImageError("truncated", "PNG without a header")
    _, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR":
        raise ImageError("decode_error", "PNG whose first chunk is no IHDR")
    kept, orientation, icc, is_whole = [_PNG_SIGNATURE], 1, None, False
    for kind, start, end in _png_chunks(data):
        if kind in _PNG_PIXEL_CHUNKS:
            kept.append(data[start:end])
            is_whole |= kind == b"IEND" and end <= len(data)
        elif kind == b"eXIf":
            orientation = exif_orientation(data[start + 8 : end - 4])
        elif kind == b"iCCP":
            icc = _png_profile(data[start + 8 : end - 4])
    return ImageFile("PNG", width, height, b"".join(kept), orientation, icc, is_whole=is_whole)


# --- WebP and GIF -------------------------------------------------------------------------------


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        yield kind, data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


def _webp_size(kind: bytes, chunk: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X" and len(chunk) >= 10:
        return 1 + int.from_bytes(chunk[4:7], "little"), 1 + int.from_bytes(chunk[7:10], "little")
    if kind == b"VP8 " and len(chunk) >= 10 and chunk[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", chunk, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(chunk) >= 5 and chunk[0] == 0x2F:
        bits = int.from_bytes(chunk[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def parse_webp(data: bytes) -> ImageFile:
    """Parse a WebP, lossy, lossless or animated."""
    end = 8 + int.from_bytes(data[4:8], "little")
    is_whole = len(data) >= end
    _refuse_blank_end(data[:end], "WebP")
    size, orientation, icc = None, 1, None
    for kind, chunk in _riff_chunks(data):
        size = size or _webp_size(kind, chunk)
        if kind == b"EXIF":
            orientation = exif_orientation(chunk)
        elif kind == b"ICCP":
            icc = chunk[:MAX_ICC_BYTES]
    if size is None:
        reason = "decode_error" if is_whole else "truncated"
        raise ImageError(reason, "WebP without a frame header")
    return ImageFile("WEBP", *size, data, orientation, icc, is_whole=is_whole)


def _refuse_blank_end(data: bytes, format: str) -> None:
    """A file that was set up and never filled: no coded picture has so many zeros at its end.

    Its decoder cannot tell, and makes a picture of them.
    """
    num_blank = len(data) - len(data.rstrip(b"\0"))
    if num_blank > max(256, len(data) // 8):
        raise ImageError("truncated", f"{format} whose last {num_blank} bytes are zero")


def parse_gif(data: bytes) -> ImageFile:
    """Parse a GIF's logical screen."""
    if len(data) < 13:
        raise ImageError("truncated", "GIF without a screen descriptor")
    width, height = struct.unpack_from("<HH", data, 6)
    return ImageFile("GIF", width, height, data, is_whole=data.rstrip(b"\0").endswith(b";"))


# --- BMP, TIFF, AVIF ----------------------------------------------------------------------------


def parse_bmp(data: bytes) -> ImageFile:
    """Parse a Windows or OS/2 bitmap's header."""
    if len(data) < 26:
        raise ImageError("truncated", "BMP without a header")
    is_core = int.from_bytes(data[14:18], "little") == 12
    width, height = struct.unpack_from("<HH" if is_core else "<ii", data, 18)
    is_whole = len(data) >= int.from_bytes(data[2:6], "little")
    return ImageFile("BMP", abs(width), abs(height), data, is_whole=is_whole)


def parse_tiff(data: bytes) -> ImageFile:
    """Accept a TIFF; its size (0 here) is known once the decoder has read the directory."""
    return ImageFile("TIFF", 0, 0, data)


def _boxes_fit(data: bytes) -> bool:
    position = 0
    while position + 8 <= len(data):
        size, _ = struct.unpack_from(">I4s", data, position)
        if size == 1 and position + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, position + 8)
        if size < 8:  # 0: to the end of the file
            return bool(size == 0)
        position += size
    return position <= len(data)


def parse_avif(data: bytes) -> ImageFile:
    """Accept an AVIF; its size (0 here) is known once the decoder has read the item properties."""
    _refuse_blank_end(data, "AVIF")
    return ImageFile("AVIF", 0, 0, data, is_whole=_boxes_fit(data))


# --- which is it? -------------------------------------------------------------------------------

_PARSERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), parse_jpeg),
    (re.compile(_PNG_SIGNATURE), parse_png),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), parse_webp),
    (re.compile(rb"GIF8[79]a"), parse_gif),
    # One whose main brand is that of all such containers names AVIF among the others.
    (re.compile(rb"....ftyp(?:avi[fs]|.{8}(?:.{4}){0,15}?avi[fs])", re.DOTALL), parse_avif),
    (re.compile(rb"BM.{12}(?:[\x0c-\x7c]\0\0\0)", re.DOTALL), parse_bmp),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), parse_tiff),
)
_UNSUPPORTED = re.compile(
    rb"....ftyp(?:hei|hev|mif1|miaf|msf1|jxl|jp2|jpx|crx)"  # HEIF, CR3
    rb"|8BPS|%PDF|\x00\x00\x01\x00.\x00"  # PSD, ICO
    rb"|\x00\x00\x00\x0c(?:JXL |jP  )|\xff\x0a|\xff\x4f\xff\x51"  # JPEG XL, JPEG 2000
    rb"|\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg",
    re.DOTALL,
)


def looks_like_image(data: bytes) -> bool:
    """Whether bytes begin as a file of a format that is decoded."""
    return any(signature.match(data) for signature, _ in _PARSERS)


def parse_image(data: bytes) -> ImageFile:
    """Recognize the format by its first bytes, never by a name or content type, and parse it.

    Raises: ImageError with reason empty, not_an_image, unsupported_format, truncated, decode_error.
    """
    if not data:
        raise ImageError("empty", "no bytes")
    for signature, parse in _PARSERS:
        if signature.match(data):
            return parse(data)
    if _UNSUPPORTED.match(data, 0, 4096):
        brand = data[8:12].decode("latin-1").strip().upper() if data[4:8] == b"ftyp" else ""
        what = f"{brand} is not read" if brand.isalnum() else f"begins with {data[:12]!r}"
        raise ImageError("unsupported_format", what)
    raise ImageError("not_an_image", f"begins with {data[:12]!r}")
