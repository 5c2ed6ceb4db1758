"""Bytes to pixels and back: the one place that decodes images.

Pixels are uint8 arrays (H, W, 3) in sRGB, upright, without alpha. Everything here is a pure
function; no library switch is touched, and foreign bytes raise `ImageError` only.
"""

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
)

from embedder.errors import ImageError
from embedder.image_files import ImageFile, parse_image

REASONS: tuple[str, ...] = (
    "empty",
    "too_large",
    "not_an_image",
    "unsupported_format",
    "too_many_pixels",
    "truncated",
    "decode_error",
)
"""Why bytes are refused; `ImageError.reason` is one of these."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Limits:
    """What is refused before a pixel is decoded."""

    max_bytes: int = 64 << 20
    max_pixels: int = 50_000_000


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class ImageHeader:
    """What a file's header says."""

    format: str
    width: int
    """In pixels, upright."""
    height: int


@dataclass(frozen=True)
class CanonicalImage:
    """An image as the pipeline stores it."""

    data: bytes
    """A JPEG in sRGB, upright, without metadata."""
    width: int
    height: int
    original_width: int
    """Of the upright original, before it was resized."""
    original_height: int
    format: str
    """Of the original file."""
    pixels: Pixels
    """(height, width, 3) before they were encoded again, where they were."""


def read_header(data: bytes, limits: Limits = DEFAULT_LIMITS) -> ImageHeader:
    """Read format and size without decoding a pixel, and hold them against the limits.

    Raises: ImageError.
    """
    file = _parse(data, limits)
    return ImageHeader(file.format, *_upright_size(file))


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Decode any supported image file to upright sRGB pixels; alpha is laid on white.

    Of animations, the first frame. Raises: ImageError.
    """
    return _render(_parse(data, limits), None, limits)


def decode_within(data: bytes, max_side: int, limits: Limits = DEFAULT_LIMITS) -> Pixels:
    """Decode, shrunk to at most `max_side` pixels on the long side.

    Faster than `decode` for large JPEGs, which are then decoded at a fraction of their size.
    Raises: ImageError.
    """
    return _render(_parse(data, limits), max_side, limits)


class DecodedImage:
    """An image file that is asked for at several sizes, and decoded once where these agree.

    A JPEG is decoded at 1/1, 1/2, 1/4 or 1/8 of its size, then shrunk: sizes agree that begin with
    the same fraction. Raises: ImageError.
    """

    def __init__(self, data: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
        self._file = _parse(data, limits)
        self._limits = limits
        self._fractions: dict[int, Pixels | None] = {}
        self._sizes: dict[tuple[int, int], Pixels] = {}
        self.num_decoded = 0
        """How often it was decoded so far."""

    @property
    def width(self) -> int:
        """Width of the whole image, upright."""
        return _upright_size(self._file)[0]

    def within(self, max_side: int | None) -> Pixels:
        """What `decode_within` gives, or `decode` for None, bit for bit; not to be written to."""
        size = _shrunk_size((self._file.width, self._file.height), max_side)
        if size not in self._sizes:
            known = len(self._fractions)
            self._sizes[size] = _render(self._file, max_side, self._limits, self._decode_jpeg)
            is_shared = len(self._fractions) == known and any(
                plain is not None for plain in self._fractions.values()
            )
            self.num_decoded += not is_shared
        return self._sizes[size]

    def _decode_jpeg(self, file: ImageFile, size: tuple[int, int]) -> Pixels | None:
        fraction = _draft_fraction(file, size)
        if fraction not in self._fractions:
            self._fractions[fraction] = _decode_jpeg(file, size)
        return self._fractions[fraction]


def canonicalize(
    data: bytes, max_side: int = 512, quality: int = 95, limits: Limits = DEFAULT_LIMITS
) -> CanonicalImage:
    """Bring foreign bytes into the stored form: an upright sRGB JPEG of at most `max_side`.

    A JPEG that is so already keeps its coded pixels bit for bit; its EXIF, XMP, GPS, comments,
    thumbnails and trailing bytes go all the same. Raises: ImageError.
    """
    file = _parse(data, limits)
    pixels = _render(file, max_side, limits)
    kept = file.data if _is_canonical(file, max_side) else encode_jpeg(pixels, quality)
    height, width = pixels.shape[:2]
    return CanonicalImage(kept, width, height, *_upright_size(file), file.format, pixels)


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """Encode (H, W, 3) sRGB pixels as a baseline JPEG, the same bytes every time."""
    import cv2

    settings = (cv2.IMWRITE_JPEG_QUALITY, quality)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), settings)
    return data.tobytes()


def resize(
    pixels: Pixels,
    width: int,
    height: int,
    filter: str = "bicubic",
    reducing_gap: float | None = None,
) -> Pixels:
    """Resize with antialiasing; `filter` is box, bilinear, bicubic or lanczos.

    `reducing_gap` 2 or 3 averages whole blocks first: faster, and hardly different.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    kernel = Image.Resampling[filter.upper()]
    image = Image.fromarray(pixels).resize((width, height), kernel, reducing_gap=reducing_gap)
    return np.asarray(image)


def resize_short_side(pixels: Pixels, size: int, filter: str = "bicubic") -> Pixels:
    """Resize so that the short side has `size` pixels; rounds down, as torchvision does."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    return resize(pixels, int(size * width / short), int(size * height / short), filter)


def center_crop(pixels: Pixels, width: int, height: int) -> Pixels:
    """Cut the middle out; rounds to even, as torchvision does. Needs pixels at least that large."""
    top = round((pixels.shape[0] - height) / 2)
    left = round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def blur_boxes(pixels: Pixels, boxes: Sequence[Sequence[float]]) -> Pixels:
    """Blur the inside of boxes (x0, y0, x1, y1 in pixels) beyond recognition; returns a copy.

    A box keeps at most 4x4 averages, so nothing of a face can be restored.
    """
    blurred = pixels.copy()
    for box in boxes:
        x0, y0, x1, y1 = _clip_box(box, pixels.shape[1], pixels.shape[0])
        if x0 < x1 and y0 < y1:
            region = Image.fromarray(blurred[y0:y1, x0:x1])
            coarse = region.resize((min(4, x1 - x0), min(4, y1 - y0)), Image.Resampling.BOX)
            blurred[y0:y1, x0:x1] = np.asarray(coarse.resize(region.size, Image.Resampling.BICUBIC))
    return blurred


def _clip_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
    return left, top, min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))


# --- from a file to a Pillow image --------------------------------------------------------------

_OPENERS: dict[str, Callable[[Any], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_WARNING = frozenset({"TIFF", "AVIF"})
"""Formats whose reader reports foreign metadata as Python warnings."""
_warning_filters = threading.Lock()  # Python 3.11 keeps them per process, not per thread


@contextmanager
def _quiet(format: str) -> Iterator[None]:
    """Keep a reader's warnings about foreign metadata away from the user."""
    if format not in _WARNING:
        yield
        return
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _foreign_errors(file: ImageFile) -> Iterator[None]:
    """Map whatever a decoder raises to an ImageError: hostile bytes reach every branch of it."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow raises over ten unrelated types here
        cut = not file.is_whole or isinstance(error, EOFError) or "truncated" in str(error).lower()
        detail = f"{file.format}: {type(error).__name__}: {error}"
        raise ImageError("truncated" if cut else "decode_error", detail) from error


def _parse(data: bytes, limits: Limits) -> ImageFile:
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, allowed are {limits.max_bytes}")
    file = parse_image(data)
    if file.width == 0:
        with _foreign_errors(file), _quiet(file.format):
            image = _open(file)
            file = replace(file, width=image.width, height=image.height)
            file = replace(file, orientation=_orientation(image))
    _check_size(file.width, file.height, limits)
    return file


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{width}x{height}, allowed are {limits.max_pixels}")
    if width * height <= 0:
        raise ImageError("decode_error", f"an image of {width}x{height} pixels")


def _open(file: ImageFile) -> Image.Image:
    if file.format == "AVIF" and not AvifImagePlugin.SUPPORTED:
        raise ImageError("unsupported_format", "this build of Pillow reads no AVIF")
    # The plugin, not Image.open: that one warns of, or refuses, sizes that our limits allow.
    return _OPENERS[file.format](io.BytesIO(file.data))


def _orientation(image: Image.Image) -> int:
    if image.format != "AVIF":  # Pillow turns TIFFs by itself
        return 1
    return int(image.getexif().get(0x0112, 1))


def _upright_size(file: ImageFile) -> tuple[int, int]:
    if file.orientation >= 5:
        return file.height, file.width
    return file.width, file.height


def _render(
    file: ImageFile,
    max_side: int | None,
    limits: Limits,
    decode_jpeg: Callable[[ImageFile, tuple[int, int]], Pixels | None] | None = None,
) -> Pixels:
    """Decode to upright pixels in sRGB, shrunk to `max_side` if given.

    decode_jpeg: stands in for `_decode_jpeg`, whose result depends on the fraction alone.
    """
    with _foreign_errors(file):
        size = _shrunk_size((file.width, file.height), max_side)
        plain = (decode_jpeg or _decode_jpeg)(file, size) if file.format == "JPEG" else None
        if plain is not None and _is_in_srgb(file):
            return _turn_upright(_to_rgb(_shrink(plain, size)), file.orientation)
        image = _load(file, size, limits) if plain is None else Image.fromarray(plain)
        if file.format == "GIF":  # a frame may be larger than the screen that the header names
            size = _shrunk_size(image.size, max_side)
        icc = file.icc or image.info.get("icc_profile")
        image = _to_8_bit_channels(image)
        transform = _transform_of(image, icc)
        if image.mode in ("L", "RGB") and transform is None:
            pixels = _to_rgb(_shrink(np.asarray(image), size))
        else:
            if size != image.size:  # Pillow keeps colors that are transparent from bleeding
                image = image.resize(size, Image.Resampling.BICUBIC)
            pixels = np.asarray(_lay_on_white(_to_srgb(image, transform)))
        return _turn_upright(pixels, file.orientation)


def _shrunk_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(size) <= max_side:
        return size
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


_CUBIC_ABOVE = 0.75
"""Above this scale plain cubic interpolation is nearer to an ideal (Lanczos) filter than averages
of areas, and takes a third of the time; below it, it would let fine patterns alias."""


def _shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (H, W) or (H, W, 3) to fewer pixels. size: width, height."""
    import cv2

    height, width = pixels.shape[:2]
    if size == (width, height):
        return pixels
    is_near = min(size[0] / width, size[1] / height) >= _CUBIC_ABOVE
    filter = cv2.INTER_CUBIC if is_near else cv2.INTER_AREA
    return np.asarray(cv2.resize(pixels, size, interpolation=filter))


_DRAFT_GAP = 1.2
"""A JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that is this much above its target."""


def _decode_jpeg(file: ImageFile, size: tuple[int, int]) -> Pixels | None:
    """(H, W) or (H, W, 3) of a JPEG in gray or RGB, which has all its pixels; None for any other.

    The same pixels as Pillow's, in three quarters of its time. Pillow keeps to itself what libjpeg
    says of missing data, which it paints gray: so a JPEG of four channels is looked at here, too.
    """
    if file.lacks_scans:
        raise ImageError("truncated", "JPEG without its last scans")
    fraction = 8 if file.num_channels == 4 else _draft_fraction(file, size)
    least = {"min_height": -(-file.height // fraction), "min_width": -(-file.width // fraction)}
    space = {1: "GRAY", 3: "RGB", 4: "CMYK"}.get(file.num_channels or 0)
    if space is None:
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(file.data, space, strict=True, **least)
    except ValueError as error:
        data = _without_padding(file.data, str(error))
        if data is not None:
            return _decode_jpeg(replace(file, data=data), size)
        if re.match("Corrupt|Premature", str(error)):
            is_cut = "remature" in str(error)
            raise ImageError("truncated" if is_cut else "decode_error", f"JPEG: {error}") from error
        return None  # where libjpeg complains of something else, Pillow is left to judge
    if space == "CMYK":
        return None
    return pixels if space == "RGB" else pixels[:, :, 0]


_FEW_BYTES = 16


def _without_padding(data: bytes, complaint: str) -> bytes | None:
    """A JPEG without what lies between its pixels and its end, if that is no lost picture data.

    Harmless are a few bytes, and any number of equal ones that follow others: where equal bytes
    stand before them, too, they were taken for pixels, and a part of the file is blank.
    """
    found = re.fullmatch(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9", complaint)
    if found is None:
        return None
    end = len(data) - 2
    start = end - int(found[1])
    padding, before = data[start:end], data[start - _FEW_BYTES : start]
    is_fill = len(set(padding)) == 1 and set(before) != set(padding)
    return data[:start] + data[end:] if is_fill or len(padding) <= _FEW_BYTES else None


def _is_in_srgb(file: ImageFile) -> bool:
    """Whether it is a JPEG in gray or RGB whose profile, if any, changes nothing."""
    mode = {1: "L", 3: "RGB"}.get(file.num_channels or 0)
    if mode is None or file.icc is None or file.icc[16:20] != _PROFILE_SPACES[mode]:
        return mode is not None
    return _srgb_transform(file.icc, mode) is None


def _draft_fraction(file: ImageFile, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: by how much a JPEG may be shrunk while it is decoded."""
    wanted = (max(1, round(size[0] * _DRAFT_GAP)), max(1, round(size[1] * _DRAFT_GAP)))
    gap = min(file.width // wanted[0], file.height // wanted[1])
    return next(fraction for fraction in (8, 4, 2, 1) if gap >= fraction or fraction == 1)


def _load(file: ImageFile, size: tuple[int, int], limits: Limits) -> Image.Image:
    with _quiet(file.format):
        image = _open(file)
        _check_size(*image.size, limits)
        if file.format == "TIFF":
            _read_planes_deep(image)
            image.load()
    if size != (file.width, file.height):
        image.draft(None, (round(size[0] * _DRAFT_GAP), round(size[1] * _DRAFT_GAP)))
    image.load()
    return image


def _read_planes_deep(image: Any) -> None:
    """Let Pillow read unpacked planes of 16 bits as such: it takes them for 8."""
    tags = image.tag_v2
    if tags.get(PLANAR_CONFIGURATION) == _PLANES_APART and max(tags.get(BITSPERSAMPLE, (8,))) == 16:
        order = "B" if tags.prefix == b"MM" else "L"
        image.tile = [
            tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:]))
            if tile.codec_name == "raw"
            else tile
            for tile in image.tile
        ]


_PLANES_APART = 2


# --- color -------------------------------------------------------------------------------------


def _to_8_bit_channels(image: Image.Image) -> Image.Image:
    """Bring any Pillow mode to L, LA, RGB, RGBA or CMYK."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith(("I", "F")) or _SIGNED in tags.get(SAMPLEFORMAT, ()):
        return Image.fromarray(_deep_gray(image))
    if image.mode == "La":
        return image.convert("LA")
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        return image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _deep_gray(image: Image.Image) -> Pixels:
    """Scale gray values of more than 8 bits; black is 0, white by the type that holds them.

    The largest number of up to 16 bits is white; of 32 bits the smallest that has 8, 16 or all of
    them and is not exceeded; of floating point see `_float_white`. Raises: ImageError.
    """
    tags = getattr(image, "tag_v2", {})
    values: NDArray[Any] = np.asarray(image)
    is_signed = _SIGNED in tags.get(SAMPLEFORMAT, ())
    kind = "f" if values.dtype.kind == "f" else "i" if is_signed else "u"
    if values.dtype.kind != kind:  # Pillow has no unsigned mode of 32 bits, nor a signed one of 8
        values = values.view(f"{kind}{values.itemsize}")
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    white = _float_white(values) if kind == "f" else _integer_white(values, bits)
    if image.info.get("transparency") is not None:  # of a PNG: this value alone
        values = np.where(values == image.info["transparency"], white, values)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        values = white - values
    values = np.nan_to_num(values, nan=0.0, posinf=white, neginf=0.0)
    scaled = np.clip(np.rint(values * (255.0 / white)), 0, 255)
    return np.asarray(scaled, np.uint8)


def _integer_white(values: NDArray[Any], bits: int) -> float:
    """White of whole numbers. Raises: ImageError where some are below black."""
    if values.min() < 0:
        raise ImageError("decode_error", "values below zero, and no word of black")
    if bits < 32:
        return 2.0 ** (bits - (values.dtype.kind == "i")) - 1
    return next(2.0**used - 1 for used in (8, 16, 32) if values.max() < 2**used)


_SIGNED, _WHITE_IS_ZERO = 2, 0
_OVERSHOOT = 1.1
"""Filters that sharpen leave values a tenth beyond white and black."""
_DARKEST = 1 / 8
"""Share of white that the brightest value must have where white is not 1."""


def _float_white(values: NDArray[Any]) -> float:
    """White of numbers in floating point: 1, 255 or 65535, the smallest that is not exceeded.

    Raises: ImageError where they are far from all three, or below black.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, np.inf)
    white = next((top for top in (1.0, 255.0, 65535.0) if high <= top * _OVERSHOOT), 0.0)
    if white == 0 or (white > 1 and high < white * _DARKEST) or low < white * (1 - _OVERSHOOT):
        raise ImageError("decode_error", f"values of {low:.3g} to {high:.3g}, and no word of white")
    return white


_PROFILE_SPACES = {"L": b"GRAY", "LA": b"GRAY", "RGB": b"RGB ", "RGBA": b"RGB ", "CMYK": b"CMYK"}


def _transform_of(image: Image.Image, icc: bytes | None) -> ImageCms.ImageCmsTransform | None:
    """The way to sRGB by the embedded profile; one that is broken or does not fit is ignored."""
    if icc and icc[16:20] == _PROFILE_SPACES[image.mode]:
        return _srgb_transform(icc, image.mode.removesuffix("A"))
    return None


def _to_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    if transform is None:
        return image.convert("RGB") if image.mode == "CMYK" else image
    if image.mode not in ("LA", "RGBA"):
        return ImageCms.applyTransform(image, transform) or image
    color = ImageCms.applyTransform(image.convert(image.mode[:-1]), transform)
    assert color is not None, "applyTransform returns an image unless it works in place"
    color.putalpha(image.getchannel("A"))
    return color


@lru_cache(maxsize=32)
def _srgb_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from a profile to sRGB; None where it changes nothing or cannot be."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        return None if _changes_little(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _changes_little(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the profile is sRGB in all but name: at most 2 of 255 off on a grid of colors."""
    if mode == "CMYK":
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        grid = Image.fromarray(levels[None])
    else:
        grid = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3))
    there = ImageCms.applyTransform(grid, transform)
    change = np.asarray(there, np.int16) - np.asarray(grid.convert("RGB"), np.int16)
    return bool(np.abs(change).max() <= 2)


def _lay_on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("LA", "RGBA"):
        return image if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return white


def _to_rgb(pixels: Pixels) -> Pixels:
    """(H, W, 3) of (H, W) or (H, W, 3)."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def _turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo what an EXIF orientation says of how pixels are stored."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# --- the stored form ----------------------------------------------------------------------------


def _is_canonical(file: ImageFile, max_side: int) -> bool:
    if file.format != "JPEG" or file.orientation != 1 or max(file.width, file.height) > max_side:
        return False
    return _is_in_srgb(file)
