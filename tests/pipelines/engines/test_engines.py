import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import ConfigError, DatasetError, EngineError, SchemaError, SpaceError
from curation.exchange import Exchange, Mapper, Reducer
from curation.stage import Resources, Task
from embedder.errors import EncoderError
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.metered_engine import MeteredEngine
from pipelines.engines.worker_process import gpu_of_worker


@pytest.fixture(scope="module", params=["local", "processes", "ray"])
def engine(request):
    if request.param == "ray":
        ray = pytest.importorskip("ray")
        from pipelines.engines.ray_engine import RayEngine

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers lack tests/
        yield RayEngine(2, first_pause_s=0.05)
        ray.shutdown()
    else:
        yield LocalEngine(0 if request.param == "local" else 2, first_pause_s=0.05)


def is_this_process(engine):
    return isinstance(engine, LocalEngine) and engine.workers == 1


def test_workers_per_node__are_all_where_there_is_one(engine):
    list(engine.map(Square(), [1], "start"))
    metered = MeteredEngine(engine, lambda *_: None)
    assert metered.workers_per_node == engine.workers_per_node == engine.workers


@dataclass(frozen=True)
class Square(Task[int, None, int]):
    def open(self):
        return 2

    def __call__(self, item, opened):
        return item**opened


@dataclass(frozen=True)
class FailsOnce(Task[int, None, int]):
    folder: str
    how: str

    def __call__(self, item, opened):
        mark = Path(self.folder) / str(item)
        if item % 3 == 0 and not mark.exists():
            mark.touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "segfault":
                ctypes.string_at(0)
            raise OSError("no luck")
        return item


@dataclass(frozen=True)
class Fails(Task[int, None, int]):
    error: type[Exception]

    def __call__(self, item, opened):
        if item == 3:
            raise self.error("broken for good")
        return item


def test_map__gives_every_result(engine):
    assert sorted(engine.map(Square(), range(20), "square")) == [(i, i * i) for i in range(20)]
    assert list(engine.map(Square(), [], "square")) == []


def test_map__failing_items_are_tried_again(engine, tmp_path):
    results = dict(engine.map(FailsOnce(str(tmp_path), "raise"), range(9), "flaky"))
    assert results == {i: i for i in range(9)}


@pytest.mark.parametrize("how", ["kill", "segfault"])
def test_map__a_worker_that_dies_costs_only_its_items(engine, how, tmp_path):
    if is_this_process(engine):
        pytest.skip("the worker is this process")
    results = dict(engine.map(FailsOnce(str(tmp_path), how), range(7), "deadly"))
    assert results == {i: i for i in range(7)}


def test_map__a_worker_that_dies_while_a_result_is_used_costs_nothing(engine, tmp_path):
    if is_this_process(engine):
        pytest.skip("the worker is this process")
    (tmp_path / "0").touch()  # 0 is answered, and 3 dies while the answer is used
    results = {}
    for item, result in engine.map(FailsOnce(str(tmp_path), "kill"), range(12), "deadly"):
        time.sleep(0 if results else 0.5)
        results[item] = result
    assert results == {i: i for i in range(12)}


@pytest.mark.parametrize(
    ("number", "visible", "installed", "wanted"),
    [
        (0, None, 0, None),  # no GPU
        (1, None, 1, None),  # one for all
        (5, None, 4, "1"),
        (1, "4, 6", 8, "6"),  # only those that this process is allowed
        (1, "7", 8, None),
        (0, "", 8, None),  # none is allowed
    ],
)
def test_gpu_of_worker__takes_turns(number, visible, installed, wanted):
    assert gpu_of_worker(number, visible, installed) == wanted


WHICH_GPUS = """
import os, sys, time
from curation.stage import Task
from pipelines.engines.local_engine import LocalEngine

class Gpu(Task):
    def __call__(self, item, opened):
        time.sleep(0.3)
        return os.environ["CUDA_VISIBLE_DEVICES"]

if __name__ == "__main__":
    print(*sorted(set(dict(LocalEngine(2).map(Gpu(), range(8), "gpus")).values())))
"""


def test_map__local_workers_share_the_gpus(tmp_path):
    (tmp_path / "which_gpus.py").write_text(WHICH_GPUS, encoding="utf-8")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "4,6"}
    command = [sys.executable, str(tmp_path / "which_gpus.py")]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["4", "6"]


@dataclass(frozen=True)
class Holds(Task[int, None, int]):
    """Takes memory in small pieces, and lets it go; gives the number of its process."""

    def __call__(self, item, opened):
        held = [np.ones(1 << 20, np.uint8) for _ in range(200)]
        time.sleep(0.2)
        return os.getpid() if held else 0


@dataclass(frozen=True)
class Reads(Task[int, None, int]):
    """Reads a table, which Arrow does in threads of its own; gives the number of its process."""

    file: str

    def __call__(self, item, opened):
        held = pq.read_table(self.file)
        time.sleep(0.2)
        return os.getpid() if held else 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("what", ["numpy", "arrow"])
def test_map__local_workers_that_wait_give_memory_back(what, tmp_path):
    file = str(tmp_path / "vectors.parquet")
    columns = np.random.default_rng(0).random((20, 1 << 20), np.float32)
    pq.write_table(pa.table(list(columns), [str(c) for c in range(20)]), file)
    engine = LocalEngine(2)
    task = Holds() if what == "numpy" else Reads(file)
    workers = set(dict(engine.map(task, range(6), "holds")).values())

    def held():
        page = os.sysconf("SC_PAGE_SIZE")
        sizes = [Path(f"/proc/{pid}/statm").read_text().split() for pid in workers]
        return max(page * (int(size[1]) - int(size[2])) for size in sizes)

    assert held() > 200 << 20  # kept for the next item
    deadline = time.monotonic() + 20
    while held() > 150 << 20 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held() < 150 << 20
    assert len(dict(engine.map(task, range(6), "again"))) == 6


@dataclass(frozen=True)
class Poisonous(Task[int, None, int]):
    """One item kills its worker every time; the others take a while."""

    def __call__(self, item, opened):
        time.sleep(0.05)
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


def test_map__an_item_that_always_kills_its_worker_is_named_alone(engine):
    if is_this_process(engine):
        pytest.skip("the worker is this process")
    results = []
    with pytest.raises(EngineError, match=r"1 of 9 shards failed 3 times \(3\)"):
        results.extend(engine.map(Poisonous(), range(9), "poison"))
    assert sorted(item for item, _ in results) == [0, 1, 2, 4, 5, 6, 7, 8]


def test_map__what_keeps_failing_is_named_and_the_rest_is_done(engine):
    results = []
    with pytest.raises(EngineError, match=r"fails: 1 of 6 shards failed 3 times \(3\).*for good"):
        results.extend(engine.map(Fails(OSError), range(6), "fails"))
    assert sorted(item for item, _ in results) == [0, 1, 2, 4, 5]


def test_map__an_error_that_cannot_be_mended_is_raised_as_it_is(engine):
    with pytest.raises(SchemaError, match="broken for good"):
        list(engine.map(Fails(SchemaError), range(6), "fails"))


def test_map__failures_are_listed_with_their_causes(engine):
    with pytest.raises(EngineError) as caught:
        list(engine.map(Fails(OSError), range(6), "fails"))
    assert caught.value.failures == ((3, "OSError: broken for good"),)


@dataclass(frozen=True)
class Digits(Mapper[int]):
    def __call__(self, item):
        numbers = np.arange(item * 10, item * 10 + 10)
        return pa.table({"number": numbers}), numbers % 4


@dataclass(frozen=True)
class Sum(Reducer):
    folder: str

    def __call__(self, bucket, rows):
        with (Path(self.folder) / str(bucket)).open("a") as calls:
            calls.write("x")
        return [int(rows["number"].to_numpy().sum()), rows["number"].to_pylist()[:3]]


def test_exchange__every_row_reaches_its_bucket_once(engine, tmp_path):
    exchange = Exchange(str(tmp_path / "x"), 4)
    results = exchange.run(engine, Digits(), range(5), Sum(str(tmp_path)))
    numbers = np.arange(50)
    assert [result[0] for result in results] == [
        int(numbers[numbers % 4 == k].sum()) for k in range(4)
    ]
    assert results[1][1] == [1, 5, 9]


def test_exchange__finished_buckets_are_not_reduced_again(tmp_path):
    exchange = Exchange(str(tmp_path / "x"), 4)
    engine = LocalEngine()
    first = exchange.run(engine, Digits(), range(5), Sum(str(tmp_path)))
    (tmp_path / "x" / "reduced" / "000002.json").unlink()
    assert exchange.run(engine, Digits(), range(5), Sum(str(tmp_path))) == first
    assert [(tmp_path / str(k)).read_text() for k in range(4)] == ["x", "x", "xx", "x"]


class TwoArgumentsError(Exception):
    """Pickles, but cannot be made again."""

    def __init__(self, what, number):
        super().__init__(f"{what} {number}")


class NoTextError(Exception):
    def __str__(self):
        raise RuntimeError("no text either")


@dataclass(frozen=True)
class Misbehaves(Task[int, None, int]):
    how: str
    resources = Resources(time_limit_s=1.0)

    def __call__(self, item, opened):
        if item == 3:
            getattr(self, self.how)()
        return item

    def cannot_be_unpickled(self):
        raise TwoArgumentsError("no luck with", 7)

    def cannot_be_pickled(self):
        raise OSError("no luck either", lambda: None)

    def is_large(self):
        raise ValueError("no luck" + " " * (1 << 21))

    def has_no_text(self):
        raise NoTextError

    def exits(self):
        sys.exit(5)

    def lacks_memory(self):
        raise MemoryError("no room")

    def sleeps(self):
        time.sleep(100)

    def hangs_in_foreign_code(self):
        ctypes.PyDLL(None).sleep(100)  # keeps Python's lock

    def is_interrupted(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cannot_be_unpickled", "TwoArgumentsError: no luck with 7"),
        ("cannot_be_pickled", "OSError: .*no luck either"),
        ("is_large", "ValueError: no luck"),
        ("has_no_text", "NoTextError: .its text cannot be told: RuntimeError"),
        ("exits", "SystemExit: 5"),
        ("lacks_memory", "MemoryError: no room"),
        ("sleeps", "TimeLimitError: took more than 1 s and was stopped.*--time-limit"),
        ("hangs_in_foreign_code", "TimeLimitError: took more than 1 s and was stopped"),
        ("is_interrupted", "KeyboardInterrupt"),
    ],
)
def test_map__whatever_an_item_does_it_alone_fails_and_says_why(engine, how, words):
    if is_this_process(engine) and how in ("sleeps", "hangs_in_foreign_code", "is_interrupted"):
        pytest.skip("nothing can stop this process but itself")
    results = []
    with pytest.raises(EngineError, match=rf"1 of 6 shards failed 3 times \(3\): {words}"):
        results.extend(engine.map(Misbehaves(how), range(6), "odd"))
    assert sorted(item for item, _ in results) == [0, 1, 2, 4, 5]
    assert len(dict(engine.map(Square(), range(4), "next"))) == 4


def test_map__one_worker_stops_an_item_that_hangs_too():
    engine = LocalEngine(1, attempts=2, first_pause_s=0.01)
    with pytest.raises(EngineError, match=r"stopped at .*test_engines.py:\d+ sleeps"):
        list(engine.map(Misbehaves("sleeps"), [3], "one"))
    # In place of what the task declares.
    engine = LocalEngine(1, attempts=2, first_pause_s=0.01, time_limit_s=0.5)
    with pytest.raises(EngineError, match=r"took more than 0\.5 s"):
        list(engine.map(Misbehaves("sleeps"), [3], "one"))


@pytest.mark.parametrize("error", [ConfigError, DatasetError, SpaceError, EncoderError])
def test_map__an_error_that_stays_is_not_tried_again(engine, error, tmp_path):
    with pytest.raises(error, match="broken for good"):
        list(engine.map(FailsCounted(error, str(tmp_path)), [3], "fails"))
    assert len(list(tmp_path.iterdir())) == 1


@dataclass(frozen=True)
class FailsCounted(Task[int, None, int]):
    error: type[Exception]
    folder: str

    def __call__(self, item, opened):
        (Path(self.folder) / str(time.monotonic_ns())).touch()
        raise self.error("broken for good")


DRIVER = """
import ctypes, sys, time
from dataclasses import dataclass
from pathlib import Path
from curation.stage import Task
from pipelines.engines.local_engine import LocalEngine
from pipelines.engines.ray_engine import RayEngine

@dataclass(frozen=True)
class Writes(Task):
    folder: str
    what: str

    def __call__(self, item, opened):
        Path(self.folder, str(item)).touch()
        if self.what == "foreign":
            ctypes.PyDLL(None).usleep(50_000)  # keeps Python's lock
        else:
            time.sleep(0.05)
        Path(self.folder, str(item)).write_text("done")

if __name__ == "__main__":
    engine = RayEngine(2) if sys.argv[2] == "ray" else LocalEngine(2)
    list(engine.map(Writes(*sys.argv[1:]), range(10_000), "writes"))
"""


@pytest.mark.parametrize("what", ["python", "foreign", "ray"])
def test_map__workers_end_with_a_driver_that_is_killed(what, tmp_path):
    script, out = tmp_path / "driver.py", tmp_path / "out"
    out.mkdir()
    script.write_text(DRIVER)
    command = [sys.executable, str(script), str(out), what]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list(out.iterdir()):
        time.sleep(0.01)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate(timeout=10)  # nobody holds its output any more
    _, alive = psutil.wait_procs(children, timeout=5)
    assert all("Agent" in process.name() for process in alive)  # Ray's own take a minute
    written = {path: path.read_text() for path in out.iterdir()}
    time.sleep(0.3)
    assert {path: path.read_text() for path in out.iterdir()} == written


@dataclass(frozen=True)
class FailsOnNamed(Task[tuple[str, int], None, None]):
    def name_of(self, item):
        return f"number {item[1]}"

    def __call__(self, item, opened):
        raise ValueError("never")


def test_map__a_task_says_what_messages_call_its_items(engine):
    with pytest.raises(EngineError, match=r"1 of 1 shards failed 3 times \(number 7\)"):
        list(engine.map(FailsOnNamed(), [("a", 7)], "named"))
