"""The engine of a Ray cluster, or of several Ray workers on this machine."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from curation.errors import ConfigError, EngineError
from curation.stage import Engine, Item, Resources, Result, Task
from pipelines.attempts import Attempts, describe

logger = logging.getLogger(__name__)

_IN_FLIGHT_PER_WORKER = 2


class RayEngine(Engine):
    """Runs tasks in open-once Ray actors; paths travel, never images or vectors.

    Work in flight is bounded by the number of actors. A node that dies costs only the items that
    it had not finished: its actors are started again elsewhere and the items are retried.
    Ray starts with the first task, not with the engine: finished runs do not pay for it.
    """

    def __init__(
        self, workers: int | None = None, *, address: str | None = None, attempts: int = 3
    ) -> None:
        self._attempts = attempts
        self._limit = workers
        self._address = address

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
        attempts = Attempts(label, self._attempts)
        pool = _ActorPool(task, self._pool_size(task.resources, len(items), label))
        try:
            yield from pool.run(list(items), attempts)
        finally:
            pool.close()
        attempts.raise_failures(len(items))

    def _pool_size(self, needed: Resources, num_items: int, label: str) -> int:
        """Actors that fit the cluster.

        Raises:
            ConfigError: not even one fits.
        """
        import ray

        _connect(self._limit, self._address)
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
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray answers at {address or 'this machine'}: {error}; check --address and "
            "RAY_ADDRESS, or leave both out to start Ray here"
        ) from error


class _Worker:
    """Runs inside an actor: opens the task with its first item, then works on items."""

    def __init__(self, task: Task[Any, Any]) -> None:
        self._task = task
        self._is_open = False
        self._opened: Any = None

    def run(self, item: Any) -> Any:
        if not self._is_open:
            self._opened, self._is_open = self._task.open(), True
        return self._task(item, self._opened)


class _ActorPool:
    """Actors of one task, each with a few items queued; a dead one is replaced."""

    def __init__(self, task: Task[Any, Any], size: int) -> None:
        import ray

        self._task = ray.put(task)
        needed = task.resources
        self._actor_class = ray.remote(_Worker).options(
            num_cpus=needed.cpus, num_gpus=needed.gpus, max_restarts=0
        )
        self._actors = [self._actor_class.remote(self._task) for _ in range(size)]
        self._running: dict[Any, tuple[int, Any]] = {}

    def run(self, items: list[Any], attempts: Attempts) -> Iterator[tuple[Any, Any]]:
        """Give (item, result) as they finish."""
        import ray

        waiting = list(reversed(items))
        while waiting or self._running:
            self._submit(waiting)
            done, _ = ray.wait(list(self._running), num_returns=1)
            for reference in done:
                slot, item = self._running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    self._replace(slot, waiting, attempts, item, error)
                except ray.exceptions.RayTaskError as error:
                    if attempts.failed(item, error.cause or error):
                        waiting.append(item)
                else:
                    yield item, result

    def close(self) -> None:
        """Stop the actors and free their resources."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _submit(self, waiting: list[Any]) -> None:
        loads = [0] * len(self._actors)
        for slot, _ in self._running.values():
            loads[slot] += 1
        while waiting and min(loads) < _IN_FLIGHT_PER_WORKER:
            slot = loads.index(min(loads))
            item = waiting.pop()
            self._running[self._actors[slot].run.remote(item)] = (slot, item)
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
        lost = [item]
        for reference in [ref for ref, (where, _) in self._running.items() if where == slot]:
            waiting.append(self._running.pop(reference)[1])
        waiting.extend(one for one in lost if attempts.failed(one, error))
        time.sleep(0.2)
        self._actors[slot] = self._actor_class.remote(self._task)
