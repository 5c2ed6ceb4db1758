"""Checkpoints: damaged ones are named, foreign ones run nothing, none holds what is not finite."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader

from curation.lock import locked
from embedder.errors import CheckpointError
from pretrain import checkpoint
from pretrain.checkpoint_reader import METADATA, read_metadata
from pretrain.digests import DIGESTS, find_damage, write_digests
from pretrain.errors import TrainingError


def state(value: float = 0.5) -> checkpoint.State:
    return {
        "method.a": torch.full((30, 4), value),
        "optimizer.a.step": torch.tensor(3.0),
        "method.half": torch.full((5,), value, dtype=torch.bfloat16),
        "method.empty": torch.zeros(0),
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for step in (2, 4):
        checkpoint.save(tmp_path, step, state(step), {"position": step})
    return tmp_path


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_load_into__gives_what_was_saved(out: Path) -> None:
    found = state(0.0)
    checkpoint.load_into(out, 4, found)
    assert all(torch.equal(found[name], value) for name, value in state(4).items())
    assert checkpoint.saved_shapes(out, 4, "method")["a"] == (30, 4)
    assert find_damage(out) == []


def test_load_into__format_is_that_of_torch(out: Path) -> None:
    folder = checkpoint.checkpoint_folder(out, 4)
    theirs = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert read_metadata(folder).state_dict_metadata == theirs


@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, checkpoint.ABOUT, DIGESTS])
def test_load__any_damaged_byte_is_named_with_the_last_good_checkpoint(
    out: Path, name: str
) -> None:
    folder = checkpoint.checkpoint_folder(out, 4)
    size = (folder / name).stat().st_size
    whole = (folder / name).read_bytes()
    for at in {0, 1, size // 3, size // 2, size - 1}:
        damage(folder / name, at)
        assert all(line.startswith("checkpoints/step-00000004/") for line in find_damage(out))
        assert find_damage(out)
        with pytest.raises(CheckpointError, match=r"step-00000004: .*goes on from step-00000002"):
            checkpoint.load_into(out, 4, state())
        (folder / name).write_bytes(whole)
    assert find_damage(out) == []


@pytest.mark.parametrize("name", ["__0_0.distcp", METADATA, checkpoint.ABOUT, DIGESTS])
@pytest.mark.parametrize("left", [0, 10, None])
def test_load__cut_or_missing_file_is_named(out: Path, name: str, left: int | None) -> None:
    path = checkpoint.checkpoint_folder(out, 4) / name
    path.unlink() if left is None else os.truncate(path, left)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_about(out, 4)
        checkpoint.load_into(out, 4, state())
    shutil.rmtree(checkpoint.checkpoint_folder(out, 2))
    with pytest.raises(CheckpointError, match="from the start: no other is whole"):
        checkpoint.read_about(out, 4)
        checkpoint.load_into(out, 4, state())


def test_read_about__a_checkpoint_that_cannot_be_checked_is_not_called_whole(out: Path) -> None:
    for step in (2, 4):
        (checkpoint.checkpoint_folder(out, step) / DIGESTS).unlink()
    with pytest.raises(CheckpointError, match=r"digests\.json is missing.*no other is whole"):
        checkpoint.read_about(out, 4)


def test_read_about__older_checkpoints_without_digests_load(out: Path) -> None:
    folder = checkpoint.checkpoint_folder(out, 4)
    (folder / DIGESTS).unlink()
    about = json.loads((folder / checkpoint.ABOUT).read_text())
    (folder / checkpoint.ABOUT).write_text(json.dumps({**about, "format_version": 1}))
    assert checkpoint.read_about(out, 4)["position"] == 4
    checkpoint.load_into(out, 4, found := state(0.0))
    assert torch.equal(found["method.a"], state(4)["method.a"])


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def without_digests(out: Path, step: int) -> Path:
    """A checkpoint as a stranger may write it: his digests would be right."""
    folder = checkpoint.checkpoint_folder(out, step)
    (folder / DIGESTS).unlink()
    return folder


def test_load__metadata_that_would_run_a_command_does_not(out: Path) -> None:
    folder = without_digests(out, 4)
    (folder / METADATA).write_bytes(pickle.dumps(Command(out / "ran")))
    for read in (
        lambda: checkpoint.load_into(out, 4, state()),
        lambda: checkpoint.saved_shapes(out, 4, "method"),
        lambda: checkpoint.stepped_parameters(out, 4, torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(CheckpointError, match=r"posix\.system, which describes no tensor"):
            read()
    assert not (out / "ran").exists()


def test_load__item_that_is_no_tensor_is_not_unpickled(out: Path) -> None:
    """Torch unpickles, without a limit, what the metadata calls bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = without_digests(out, 4)
    shutil.rmtree(folder)
    with checkpoint._single_process_is_fine():
        save({"method.a": Command(out / "ran")}, checkpoint_id=folder, no_dist=True)
    found = FileSystemReader(folder).read_metadata().state_dict_metadata["method.a"]
    assert isinstance(found, BytesStorageMetadata)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        checkpoint.load_into(out, 4, {"method.a": torch.zeros(30, 4)})
    assert not (out / "ran").exists()


def test_load__metadata_that_claims_more_than_the_files_hold(out: Path) -> None:
    folder = without_digests(out, 4)
    metadata = FileSystemReader(folder).read_metadata()
    metadata.state_dict_metadata["method.a"].size = torch.Size([1, 10**9, 10**6])
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="more than the files"):
        checkpoint.saved_shapes(out, 4, "method")


def test_load__files_outside_the_folder_are_not_read(out: Path) -> None:
    folder = without_digests(out, 4)
    metadata = FileSystemReader(folder).read_metadata()
    for part in metadata.storage_data.values():
        part.relative_path = "../step-00000002/__0_0.distcp"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not reach byte"):
        checkpoint.load_into(out, 4, state())


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 3000), value=st.binary(min_size=1, max_size=3))
def test_read_metadata__any_bytes_give_tensors_or_one_error(
    out: Path, at: int, value: bytes
) -> None:
    folder = checkpoint.checkpoint_folder(out, 4)
    whole = (folder / METADATA).read_bytes()
    at %= len(whole)
    (folder / METADATA).write_bytes(whole[:at] + value + whole[at + len(value) :])
    with suppress(ValueError):
        assert isinstance(read_metadata(folder).state_dict_metadata, dict)
    (folder / METADATA).write_bytes(whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_save__what_is_not_finite_is_not_saved(out: Path, bad: float) -> None:
    broken = state()
    broken["method.half"][3] = bad
    with pytest.raises(TrainingError, match=r"such as method\.half; nothing is saved; .* step 4"):
        checkpoint.save(out, 6, broken, {})
    assert checkpoint.saved_steps(out) == [2, 4]
    assert [*(out / "checkpoints").glob("*.partial")] == []


def test_save__sums_that_overflow_are_no_reason(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.full((10,), 1e308, dtype=torch.float64)}, {})


def test_save__no_room_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit stands for a full disk: the file ends in the middle of the tensors."""
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from pretrain import checkpoint\n"
        "state = {'a': torch.rand(500_000)}\n"
        "checkpoint.save(Path(sys.argv[1]), 2, state, {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "checkpoint.save(Path(sys.argv[1]), 4, state, {})\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    failed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert "step-00000004: cannot be written: it takes 2.0 MB, and" in failed.stderr
    assert checkpoint.saved_steps(tmp_path) == [2]
    assert [*(tmp_path / "checkpoints").glob("*.partial")] == []


def test_find_damage__covers_all_that_a_run_leaves(out: Path) -> None:
    (out / "log.jsonl").write_text('{"step": 1}\n')
    (out / "small").mkdir()
    (out / "small" / "backbone.safetensors").write_bytes(bytes(100))
    write_digests(out)
    assert find_damage(out) == []
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 2}\n')  # since the last checkpoint
    assert find_damage(out) == []
    for name in ("log.jsonl", "small/backbone.safetensors"):
        damage(out / name, 5)
        assert find_damage(out) == [f"{name}: is not what was written: its SHA-256 differs"]
        damage(out / name, 5)
    for at in range((out / DIGESTS).stat().st_size):
        damage(out / DIGESTS, at)
        assert find_damage(out)
        damage(out / DIGESTS, at)
    (out / "small" / "backbone.safetensors").unlink()
    assert find_damage(out) == ["small/backbone.safetensors: is missing"]


def test_find_damage__knows_nothing_of_the_lock_of_the_run_that_writes(out: Path) -> None:
    with locked(str(out)):
        write_digests(out)
    assert find_damage(out) == []
