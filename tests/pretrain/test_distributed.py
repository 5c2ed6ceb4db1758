"""Two processes with half the batch each do what one does with all of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.run_log import read_lines
from pretrain.train import run
from tests.pretrain.small_runs import write_folder
from tests.pretrain.two_processes import CASES, resumable, series

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pair")
    images = str(write_folder(folder / "images", 24))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.pretrain.two_processes"]
    processes = [
        subprocess.Popen([*command, str(i), str(folder), images], cwd=ROOT, env=environment)
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder, images, torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "bound"), [("float32", 1e-5), ("float64 koleo", 1e-9), ("centering", 1e-3)]
)
def test_two_processes__follow_one(
    pair: tuple[Path, str, dict[str, Any]], name: str, bound: float
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table, teacher = series(pair[1], name)
    torch.set_num_threads(threads)
    assert name in CASES
    theirs, their_teacher = pair[2][name]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(table), rtol=bound, atol=bound)
    for key, value in teacher.items():
        torch.testing.assert_close(their_teacher[key], value, rtol=bound, atol=10 * bound)


def test_add_bad__bad_images_of_all_processes_are_listed_once(
    pair: tuple[Path, str, dict[str, Any]],
) -> None:
    listed = read_lines(pair[0] / "run" / "bad_images.jsonl")
    assert [record["id"] for record in listed] == ["both.jpg", "0.jpg", "1.jpg"]


def test_run__goes_on_with_another_number_of_processes(
    pair: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    folder, images, _ = pair
    resumed = run(resumable(1, 6), images, str(folder / "run"))
    whole = run(resumable(1, 6), images, str(tmp_path))
    ours, theirs = (
        [record["loss"] for record in read_lines(result.log)] for result in (resumed, whole)
    )
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-4)
