import io
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw

from embedder.errors import ImageError
from embedder.images import (
    REASONS,
    Limits,
    blur_boxes,
    canonicalize,
    center_crop,
    decode,
    decode_within,
    encode_jpeg,
    read_header,
    resize,
    resize_short_side,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """Return a smooth picture whose four corners differ."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.stack([255 * x, 255 * y, 120 + 100 * x * y], -1).astype(np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = "SECRET place"
    return block.tobytes()


def png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compress(b"\0" * (side // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def differ(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"quality": 95}),
        ("AVIF", {"quality": 95}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_decode__formats(format: str, options: dict[str, object]) -> None:
    data = saved(scene(), format, **options)
    assert differ(decode(data), np.asarray(scene())) < 4
    header = read_header(data)
    assert (header.format, header.width, header.height) == (format, 48, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_decode__orientation_as_pillow_turns_it(format: str, orientation: int) -> None:
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    upright = scene() if turned is None else scene().transpose(Image.Transpose(turned))
    data = saved(scene(), format, exif=exif(orientation))
    assert decode(data).shape == np.asarray(upright).shape
    assert differ(decode(data), np.asarray(upright)) < 4
    header = read_header(data)
    assert (header.width, header.height) == upright.size


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_decode__modes_in_tiff(mode: str) -> None:
    image = scene().convert(mode)
    assert differ(decode(saved(image, "TIFF")), np.asarray(image.convert("RGB"))) < 2


def test_decode__cmyk_jpeg() -> None:
    data = saved(scene().convert("CMYK"), "JPEG", quality=95)
    assert differ(decode(data), np.asarray(scene())) < 6


# --- JPEGs and their ends -----------------------------------------------------------------------

END = b"\xff\xd9"
JPEG_KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "4:2:0": ("RGB", {}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "restarts": ("RGB", {"restart_marker_blocks": 10}),
    "own tables": ("RGB", {"optimize": True}),
    "profile": ("RGB", {"icc_profile": "its own"}),
    "gray": ("L", {}),
    "gray, progressive": ("L", {"progressive": True}),
    "CMYK": ("CMYK", {}),
    "CMYK, progressive": ("CMYK", {"progressive": True}),
}


def rough_jpeg(kind: str) -> bytes:
    """A JPEG with something to lose in every part."""
    mode, options = JPEG_KINDS[kind]
    noise = np.random.default_rng(0).integers(0, 60, (200, 300, 3))
    pixels = (0.75 * np.asarray(scene(300, 200)) + noise).astype(np.uint8)
    if "icc_profile" in options:
        options = {"icc_profile": lab_like_profile()}
    return saved(Image.fromarray(pixels).convert(mode), "JPEG", quality=90, **options)


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_decode__jpeg_without_its_last_marker_has_all_its_pixels(kind: str) -> None:
    data = rough_jpeg(kind)
    assert data.endswith(END)
    for cut in (data[:-2], data[:-1]):
        assert np.array_equal(decode(cut), decode(data))
        assert canonicalize(cut).data == canonicalize(data).data


@pytest.mark.parametrize("padding", [b"\0" * 3, b"\0" * 4000, b"\xff" * 4000, b"a\0z"])
def test_decode__padding_before_the_last_marker_does_no_harm(padding: bytes) -> None:
    for kind in ("4:4:4", "progressive", "gray", "CMYK"):
        data = rough_jpeg(kind)
        assert np.array_equal(decode(data[:-2] + padding + END), decode(data))


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("side", [None, 100])
def test_decode__jpeg_without_its_second_half_is_refused(kind: str, side: int | None) -> None:
    data = rough_jpeg(kind)
    half, lost = data[: len(data) // 2], len(data) - len(data) // 2 - 2
    page = b"<html><body>500 Internal Server Error</body></html>\n"
    filled = [b"\0" * lost, b"\xff" * lost, page, (page * lost)[:lost], b"", b"\x80" * lost]
    for rest in (*filled, *(body + END for body in filled)):
        with pytest.raises(ImageError) as caught:
            decode(half + rest) if side is None else decode_within(half + rest, side)
        assert caught.value.reason in ("truncated", "decode_error")


def test_decode__jpeg_cut_between_its_scans_is_truncated() -> None:
    """Nothing in what is left is damaged: the picture is there, but coarse or without colors."""
    data = rough_jpeg("progressive")
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(starts) > 3
    for start in starts[1:]:
        table = data.rfind(b"\xff\xc4", 0, start)  # the tables of the next scan stand before it
        with pytest.raises(ImageError, match="truncated: JPEG without its last scans"):
            decode(data[:table] + END)


# --- tones --------------------------------------------------------------------------------------

Y, X = np.mgrid[0:48, 0:64]
RAMP = (X * 1000 + Y * 50).astype(np.uint16)
"""(48, 64), of 0 to 65350."""


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def tiff_of_12_bits() -> bytes:
    values = RAMP >> 4
    packed = np.zeros((48, 96), np.uint8)
    packed[:, 0::3] = values[:, 0::2] >> 4
    packed[:, 1::3] = ((values[:, 0::2] & 15) << 4) | (values[:, 1::2] >> 8)
    packed[:, 2::3] = values[:, 1::2] & 255
    data = packed.tobytes()
    tags = [(256, 4, 64), (257, 4, 48), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 1), (278, 4, 48), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = struct.pack("<I", 8 + len(data))
    return b"II*\0" + start + data + struct.pack("<H", len(tags)) + entries + bytes(4)


SHARE = (RAMP / 65535).astype(np.float32)
TONES = {
    "16 bits": tiff(RAMP),
    "16 bits, big endian": tiff(RAMP, byteorder=">"),
    "16 bits, packed": tiff(RAMP, compression="zlib"),
    "16 bits, white is zero": tiff(65535 - RAMP, photometric="miniswhite"),
    "16 bits, white is zero, packed": tiff(
        65535 - RAMP, photometric="miniswhite", compression="zlib"
    ),
    "16 bits, signed": tiff((RAMP // 2).astype(np.int16)),
    "12 bits": tiff_of_12_bits(),
    "8 bits": tiff((RAMP >> 8).astype(np.uint8)),
    "8 bits, signed": tiff((RAMP >> 9).astype(np.int8)),
    "8 bits, white is zero": tiff((255 - (RAMP >> 8)).astype(np.uint8), photometric="miniswhite"),
    "8 bits, white is zero, packed": tiff(
        (255 - (RAMP >> 8)).astype(np.uint8), photometric="miniswhite", compression="zlib"
    ),
    "32 bits, all used": tiff(RAMP.astype(np.uint32) * 65537),
    "32 bits, all used, packed": tiff(RAMP.astype(np.uint32) * 65537, compression="zlib"),
    "32 bits, 16 used": tiff(RAMP.astype(np.uint32)),
    "32 bits, signed": tiff(RAMP.astype(np.int32)),
    "float to 1": tiff(SHARE),
    "float to 1, big endian": tiff(SHARE, byteorder=">"),
    "float to 1, white is zero": tiff(1 - SHARE, photometric="miniswhite"),
    "float to 1.02": tiff(SHARE * np.float32(1.02)),
    "float to 255": tiff(SHARE * 255),
    "float to 65535": tiff(RAMP.astype(np.float32)),
    "planes of 16 bits": tiff(np.stack([RAMP] * 3), photometric="rgb", planarconfig="separate"),
    "planes of 16 bits, big endian": tiff(
        np.stack([RAMP] * 3), photometric="rgb", planarconfig="separate", byteorder=">"
    ),
    "planes of 16 bits, packed": tiff(
        np.stack([RAMP] * 3), photometric="rgb", planarconfig="separate", compression="zlib"
    ),
    "planes of 8 bits": tiff(
        np.stack([(RAMP >> 8).astype(np.uint8)] * 3), photometric="rgb", planarconfig="separate"
    ),
    "PNG of 16 bits": saved(Image.fromarray(RAMP), "PNG"),
}


@pytest.mark.parametrize("kind", TONES)
def test_decode__the_same_ramp_however_it_is_stored(kind: str) -> None:
    for pixels in (decode(TONES[kind]), canonicalize(TONES[kind]).pixels):
        off = np.abs(pixels - RAMP[..., None] / 257)
        assert off.max() <= (6 if "1.02" in kind else 3 if "signed" in kind else 1.5)


def test_decode__infinite_and_missing_values_are_one_pixel_each() -> None:
    values = SHARE.copy()
    values[0, :3] = np.inf, -np.inf, np.nan
    pixels = decode(tiff(values))[..., 0]
    assert pixels[0, :3].tolist() == [255, 0, 0]
    assert np.array_equal(pixels[1:], decode(tiff(SHARE))[1:, :, 0])


@pytest.mark.parametrize(
    "values",
    [
        SHARE * 5,
        SHARE * 1000,
        SHARE * 1e9,
        SHARE - 0.5,
        np.full_like(SHARE, np.nan),
        RAMP.astype(np.int32) - 30000,
        (RAMP.astype(np.int32) - 32768).astype(np.int16),
        (RAMP.astype(np.int32) // 256 - 128).astype(np.int8),
        SHARE.astype(np.float16),
        SHARE.astype(np.float64),
        RAMP.astype(np.uint64),
    ],
)
def test_decode__values_without_a_black_or_white_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ImageError, match="decode_error"):
        decode(tiff(values))


# --- containers and their kinds -----------------------------------------------------------------


@pytest.mark.parametrize("brand", [b"avif", b"mif1", b"miaf", b"msf1"])
def test_decode__avif_by_any_of_its_brands(brand: bytes) -> None:
    data = saved(scene(), "AVIF")
    assert b"avif" in data[16:32]
    renamed = data[:8] + brand + data[12:]
    assert np.array_equal(decode(renamed), decode(data))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "MIF1"),
        (b"\0\0\0\x14ftypcrx \0\0\0\x01crx ", "CRX"),
    ],
)
def test_decode__other_containers_are_refused_by_name(start: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"unsupported_format: {name} is not read"):
        decode(start + bytes(200))


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_decode__file_that_was_never_filled_is_truncated(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = saved(noise, format)
    half = len(data) // 2
    with pytest.raises(ImageError, match=r"truncated: .* bytes are zero"):
        decode(data[:half] + bytes(len(data) - half))
    flat = saved(Image.new("RGB", (2000, 2000), (128, 128, 128)), format)
    assert decode(flat).shape == (2000, 2000, 3)


def test_decode__gif_without_its_trailer_and_png_without_its_end() -> None:
    for format, size in (("GIF", 1), ("PNG", 12)):
        data = saved(scene().convert("P"), format)
        assert np.array_equal(decode(data[:-size]), decode(data))


def test_decode__deep_png_with_a_transparent_value() -> None:
    image = Image.fromarray(RAMP)
    pixels = decode(saved(image, "PNG", transparency=int(RAMP[3, 4])))
    assert tuple(pixels[3, 4]) == WHITE
    assert abs(int(pixels[3, 6, 0]) - RAMP[3, 6] / 257) < 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_decode__deep_gray_keeps_its_range(dtype: type) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64), (8, 1))
    values = (ramp / 65535 if dtype is np.float32 else ramp).astype(dtype)
    pixels = decode(saved(Image.fromarray(values), "TIFF"))
    assert differ(pixels[..., 0], ramp / 257) < 1


def test_decode__sixteen_bit_png() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64), (8, 1)).astype(np.uint16)
    assert differ(decode(saved(Image.fromarray(ramp), "PNG"))[..., 1], ramp / 257) < 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_decode__alpha_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    data = saved(image.convert(mode), "PNG")
    pixels = decode(data)
    assert tuple(pixels[0, 0]) == WHITE
    assert tuple(pixels[0, 7]) != WHITE


def test_decode__half_transparent_red_is_pink() -> None:
    data = saved(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG")
    assert np.allclose(decode(data)[0, 0], (255, 127, 127), atol=1)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_decode__first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, (0, 0, 255))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    assert differ(decode(data), np.asarray(frames[0])) < 3


def lab_like_profile() -> bytes:
    """Return an RGB profile that is far from sRGB: its red and blue primaries change places."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = srgb.index(b"rXYZ"), srgb.index(b"bXYZ")
    srgb[red : red + 4], srgb[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(srgb)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_decode__profile_is_applied(format: str) -> None:
    red = Image.new("RGB", (16, 16), RED)
    pixels = decode(saved(red, format, icc_profile=lab_like_profile()))
    assert np.allclose(pixels[8, 8], (0, 0, 255), atol=12)


def test_decode__profile_and_alpha() -> None:
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    image.paste((*RED, 255), (0, 0, 4, 8))
    pixels = decode(saved(image, "PNG", icc_profile=lab_like_profile()))
    assert np.allclose(pixels[0, 0], (0, 0, 255), atol=12)
    assert tuple(pixels[0, 7]) == WHITE


@pytest.mark.parametrize("icc", [b"nonsense", lab_like_profile()[:300]])
def test_decode__broken_profile_is_ignored(icc: bytes) -> None:
    assert differ(decode(saved(scene(), "PNG", icc_profile=icc)), np.asarray(scene())) < 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF"])
def test_decode__cut_file_is_truncated(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = saved(noise, format)
    with pytest.raises(ImageError) as caught:
        decode(data[: len(data) * 2 // 3])
    assert caught.value.reason == "truncated"


def test_decode__bomb_is_refused_from_its_header() -> None:
    data = png_bomb(30_000)
    assert len(data) < 1 << 20
    tracemalloc.start()
    with pytest.raises(ImageError, match="too_many_pixels: 30000x30000"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (1 << 20)
    tracemalloc.stop()


def test_decode__limits() -> None:
    data = saved(scene(), "PNG")
    with pytest.raises(ImageError, match="too_large"):
        decode(data, Limits(max_bytes=len(data) - 1))
    with pytest.raises(ImageError, match="too_many_pixels"):
        read_header(data, Limits(max_pixels=48 * 32 - 1))
    assert decode(data, Limits(len(data), 48 * 32)).shape == (32, 48, 3)


def test_decode__beyond_pillows_own_limit_when_ours_allow_it() -> None:
    assert decode_within(png_bomb(14_000), 64, Limits(max_pixels=200_000_000)).shape == (64, 64, 3)


def test_decode__same_pixels_from_many_threads() -> None:
    files = [saved(scene(), f, exif=exif(6)) for f in ("JPEG", "PNG", "TIFF", "AVIF", "WEBP")] * 8
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(decode, files), map(decode, files)))


def test_decode_within__close_to_a_full_decode() -> None:
    data = saved(scene(1600, 900), "JPEG", quality=90)
    small = decode_within(data, 200)
    assert small.shape == (112, 200, 3)
    assert differ(small, resize(decode(data), 200, 112)) < 1


def test_canonicalize__plain_jpeg_is_untouched() -> None:
    data = saved(scene(), "JPEG", quality=80, progressive=True)
    canonical = canonicalize(data)
    assert canonical.data == data
    assert np.array_equal(canonical.pixels, decode(data))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_canonicalize__metadata_goes_but_pixels_stay(mode: str) -> None:
    image = scene().convert(mode)
    loud = saved(image, "JPEG", exif=exif(1), comment=b"SECRET", xmp=b"SECRET", quality=80)
    canonical = canonicalize(loud + b"SECRET")
    assert b"SECRET" not in canonical.data
    assert b"Exif" not in canonical.data
    assert canonical.data == saved(image, "JPEG", quality=80)


def test_canonicalize__srgb_profile_is_dropped_without_encoding_again() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    canonical = canonicalize(saved(scene(), "JPEG", quality=80, icc_profile=srgb))
    assert canonical.data == saved(scene(), "JPEG", quality=80)


@pytest.mark.parametrize(
    "options", [{"exif": exif(6)}, {"icc_profile": lab_like_profile()}, {"comment": b"SECRET"}]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_canonicalize__result_is_a_clean_jpeg(format: str, options: dict[str, object]) -> None:
    canonical = canonicalize(saved(scene(700, 400), format, **options))
    file = Image.open(io.BytesIO(canonical.data))
    assert file.format == "JPEG"
    assert file.size == (canonical.width, canonical.height)
    assert max(file.size) == 512
    assert {"exif", "icc_profile", "comment"}.isdisjoint(file.info)
    assert differ(decode(canonical.data), canonical.pixels) < 3
    again = canonicalize(canonical.data)
    assert again.data == canonical.data


def test_canonicalize__both_sizes_are_upright() -> None:
    canonical = canonicalize(saved(scene(700, 400), "JPEG", exif=exif(6)))
    assert (canonical.original_width, canonical.original_height) == (400, 700)
    assert (canonical.width, canonical.height) == (293, 512)
    assert canonical.pixels.shape == (512, 293, 3)


def test_canonicalize__thin_image_keeps_a_pixel() -> None:
    assert canonicalize(saved(scene(3000, 1), "PNG")).height == 1


def test_encode_jpeg__same_bytes_every_time() -> None:
    assert encode_jpeg(np.asarray(scene())) == encode_jpeg(np.asarray(scene()))


def test_resize__shapes() -> None:
    pixels = np.asarray(scene(50, 30))
    assert resize(pixels, 20, 10, "box").shape == (10, 20, 3)
    assert resize_short_side(pixels, 15).shape == (15, 25, 3)
    assert center_crop(pixels, 20, 10).shape == (10, 20, 3)
    assert np.array_equal(center_crop(pixels, 20, 10), pixels[10:20, 15:35])


def test_blur_boxes__strong_inside_untouched_outside() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    blurred = blur_boxes(noise, [(10.2, 5, 29.7, 25), (55, 35, 99, 99), (-9, -9, 0, 0)])
    changed = (blurred != noise).any(-1)
    assert changed[5:25, 10:30].mean() > 0.95
    changed[5:25, 10:30] = changed[35:, 55:] = False
    assert not changed.any()
    assert blurred[5:25, 10:30].std() < noise.std() / 3
    assert np.array_equal(blurred, blur_boxes(noise, [(10, 5, 30, 25), (55, 35, 60, 40)]))


def fuzz_seeds() -> list[bytes]:
    image = scene()
    ImageDraw.Draw(image).text((4, 4), "fuzz", fill=(9, 9, 9))
    rgba = image.convert("RGBA")
    rgba.putalpha(image.convert("L"))
    options = {"exif": exif(6), "icc_profile": lab_like_profile()}
    return [
        saved(image, "JPEG", progressive=True, **options),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image.convert("L"), "JPEG", comment=b"x"),
        saved(rgba, "PNG", **options),
        saved(image.convert("P"), "PNG"),
        saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256), "PNG"),
        saved(image, "WEBP", **options),
        saved(rgba, "WEBP", lossless=True),
        saved(image, "WEBP", save_all=True, append_images=[rgba]),
        saved(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        saved(image, "AVIF", **options),
        saved(image, "BMP"),
        saved(image, "TIFF", compression="tiff_lzw", **options),
        saved(image, "TIFF", compression="jpeg"),
        saved(image.convert("1"), "TIFF", compression="group4"),
    ]


SEEDS = fuzz_seeds()


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        other = draw(st.sampled_from(SEEDS))
        at = draw(st.integers(0, min(len(data), len(other))))
        data = data[:at] + other[at:] if draw(st.booleans()) else other[:at] + data[at:]
    cut = draw(st.integers(0, len(data))) if draw(st.integers(0, 3)) == 0 else len(data)
    return bytes(data[:cut])


def check_foreign_bytes(data: bytes) -> None:
    reason = None
    try:
        canonical = canonicalize(data, max_side=32, limits=Limits(max_pixels=1_000_000))
    except ImageError as error:
        reason = error.reason
    if reason is None:
        assert decode(canonical.data).shape == canonical.pixels.shape
    assert reason in (None, *REASONS)


@settings(max_examples=400, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(data=mutated_files())
def test_canonicalize__mutated_files_give_a_jpeg_or_a_reason(data: bytes) -> None:
    check_foreign_bytes(data)


@settings(max_examples=200, deadline=5000)
@given(data=st.binary(max_size=300), seed=st.sampled_from(SEEDS), keep=st.integers(0, 40))
def test_canonicalize__random_bytes_after_a_true_start(data: bytes, seed: bytes, keep: int) -> None:
    check_foreign_bytes(seed[:keep] + data)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(data=mutated_files())
def test_canonicalize__long_fuzz(data: bytes) -> None:
    check_foreign_bytes(data)


def test_canonicalize__gif_frame_larger_than_its_screen_is_shrunk_too() -> None:
    """The header of a GIF names its screen; a frame may be larger."""
    buffer = io.BytesIO()
    Image.new("L", (160, 90), 77).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[6:10] = (64).to_bytes(2, "little") + (48).to_bytes(2, "little")
    image = canonicalize(bytes(data), max_side=128)
    assert max(image.width, image.height) == 128
