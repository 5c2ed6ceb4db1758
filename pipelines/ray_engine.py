"""The engine of a Ray cluster, or of several Ray workers on this machine."""

import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from curation.errors import ConfigError, EngineError
from curation.stage import Engine, Item, Resources, Result, Task
from pipelines.attempts import Attempts, describe

logger = logging.getLogger(__name__)

_IN_FLIGHT_PER_WORKER = 2


class RayEngine(Engine):
    """Runs tasks in a pool of Ray actors; paths travel, never images or vectors.

    The actors live as long as the engine and open each task once, so that a stage costs no start
    of processes. Work in flight is bounded by their number. A node that dies costs only the items
    that it had not finished: its actors are started again elsewhere and the items are retried.
    Ray starts with the first item, not with the engine: finished runs do not pay for it.
    """

    def __init__(
        self, workers: int | None = None, *, address: str | None = None, attempts: int = 3
    ) -> None:
        self._attempts = attempts
        self._limit = workers
        self._address = address
        self._pool: _ActorPool | None = None

    @property
    def workers(self) -> int:
        """Actors of one core that run at once."""
        import ray

        _connect(self._limit, self._address)
        cores = int(ray.cluster_resources().get("CPU", 1))
        return min(cores, self._limit or cores)

    def map(
        self, task: Task[Item, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run a task on every item (see `Engine.map`)."""
        if not items:
            return
        _connect(self._limit, self._address)
        attempts = Attempts(label, self._attempts)
        pool = self._pool_for(task.resources, len(items), label)
        yield from pool.run(task, list(items), attempts)
        attempts.raise_failures(len(items))

    def _pool_for(self, needed: Resources, num_items: int, label: str) -> "_ActorPool":
        """The pool of the last task where it fits, else a new one in its place."""
        size = self._pool_size(needed, num_items, label)
        if self._pool is None or not self._pool.serves(needed, size):
            if self._pool is not None:
                self._pool.close()
            self._pool = _ActorPool(needed, size)
        return self._pool

    def _pool_size(self, needed: Resources, num_items: int, label: str) -> int:
        """Actors that fit the cluster.

        Raises:
            ConfigError: not even one fits.
        """
        import ray

        have = ray.cluster_resources()
        cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
        fits = int(cpus // needed.cpus) if needed.cpus else num_items
        if needed.gpus:
            fits = min(fits, int(gpus // needed.gpus))
        if fits == 0:
            raise ConfigError(
                f"{label}: a task needs {needed.cpus:g} CPUs and {needed.gpus:g} GPUs, the Ray "
                f"cluster has {cpus:g} and {gpus:g}; add nodes or lower the stage's needs"
            )
        return max(1, min(fits, num_items, self._limit or fits))


def _connect(workers: int | None, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # guarantee 5: no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray answers at {address or 'this machine'}: {error}; check --address and "
            "RAY_ADDRESS, or leave both out to start Ray here"
        ) from error


class _Worker:
    """Runs inside an actor: opens each task with its first item, then works on items."""

    def __init__(self) -> None:
        self._key = ""
        self._opened: Any = None

    def run(self, key: str, task: Task[Any, Any], item: Any) -> Any:
        if self._key != key:
            self._key, self._opened = "", None  # the last task's model goes first
            self._opened = task.open()
            self._key = key
        return task(item, self._opened)


class _ActorPool:
    """Actors with the same resources, each with a few items queued; a dead one is replaced."""

    def __init__(self, needed: Resources, size: int) -> None:
        import ray

        self._needed = needed
        self._actor_class = ray.remote(_Worker).options(
            num_cpus=needed.cpus, num_gpus=needed.gpus, max_restarts=0
        )
        self._actors = [self._actor_class.remote() for _ in range(size)]
        self._running: dict[Any, tuple[int, Any]] = {}

    def serves(self, needed: Resources, size: int) -> bool:
        """Whether a task with these needs can use the pool."""
        same = (needed.cpus, needed.gpus) == (self._needed.cpus, self._needed.gpus)
        return same and len(self._actors) >= size

    def run(
        self, task: Task[Any, Any], items: list[Any], attempts: Attempts
    ) -> Iterator[tuple[Any, Any]]:
        """Give (item, result) as they finish."""
        import ray

        call = (uuid.uuid4().hex, ray.put(task))
        waiting = list(reversed(items))
        try:
            while waiting or self._running:
                self._submit(call, waiting)
                done, _ = ray.wait(list(self._running), num_returns=1)
                slot, item = self._running.pop(done[0])
                try:
                    result = ray.get(done[0])
                except ray.exceptions.RayActorError as error:
                    self._replace(slot, waiting, attempts, item, error)
                except ray.exceptions.RayTaskError as error:
                    if attempts.failed(item, error.cause or error):
                        waiting.append(item)
                else:
                    yield item, result
        finally:
            self._running.clear()  # what an abandoned map had in flight is nobody's any more

    def close(self) -> None:
        """Stop the actors and free their resources."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _submit(self, call: tuple[str, Any], waiting: list[Any]) -> None:
        loads = [0] * len(self._actors)
        for slot, _ in self._running.values():
            loads[slot] += 1
        while waiting and min(loads) < _IN_FLIGHT_PER_WORKER:
            slot = loads.index(min(loads))
            item = waiting.pop()
            self._running[self._actors[slot].run.remote(*call, item)] = (slot, item)
            loads[slot] += 1

    def _replace(
        self, slot: int, waiting: list[Any], attempts: Attempts, item: Any, error: Exception
    ) -> None:
        """Start an actor anew; what it had not finished goes back.

        Raises:
            EngineError: it could not even start: the others would not either.
        """
        if getattr(error, "actor_init_failed", False):
            raise EngineError(f"Ray workers cannot start: {' '.join(str(error).split())[:500]}")
        logger.warning("a worker died on shard %s: %s", describe(item), str(error).split("\n")[0])
        for reference in [ref for ref, (where, _) in self._running.items() if where == slot]:
            waiting.append(self._running.pop(reference)[1])
        if attempts.failed(item, error):
            waiting.append(item)
        time.sleep(0.2)
        self._actors[slot] = self._actor_class.remote()
