"""The engine of a Ray cluster, or of several Ray workers on this machine."""

import contextlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.errors import EngineError
from curation.stage import Engine, Item, Opened, Resources, Result, Task
from embedder.errors import one_line
from pipelines.engines.attempts import Backlog
from pipelines.engines.memory_guard import MemoryGuard, MemoryLimitError, give_back, private_bytes
from pipelines.engines.outcome import Outcome, TimeLimitError, WorkerDiedError
from pipelines.engines.ray_cluster import Node, connect, fits, most, nodes, places, require_place
from pipelines.engines.time_guard import OPENING_S, ending_after

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_IN_FLIGHT_PER_WORKER = 2
_SECONDS_BETWEEN_LOOKS = 5.0
"""How often the cluster is asked whether it has grown."""
_SECONDS_BETWEEN_WARNINGS = 60.0
_SECONDS_TO_OPEN = 600.0
"""For a node to open models, when all are asked."""
_LIBRARIES_BYTES = 1 << 30
"""What a worker may hold besides its items."""


class RayEngine(Engine):
    """Runs tasks in a pool of Ray actors; paths travel, never images or vectors.

    The actors live as long as the engine and open each task once, so that a stage costs no start
    of processes. Work in flight is bounded by their number. A node that dies costs only the items
    that it had not finished: its actors are started again elsewhere and the items are retried.
    Nodes that join later are used. Ray starts with the first item, not with the engine: finished
    runs do not pay for it.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        address: str | None = None,
        attempts: int = 3,
        first_pause_s: float = 0.5,
        time_limit_s: float | None = None,
    ) -> None:
        self.time_limit_s = time_limit_s
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._limit = workers
        self._address = address
        self._pool: _ActorPool | None = None

    @property
    def workers(self) -> int:
        """Actors of one core that run at once."""
        import ray

        connect(self._limit, self._address)
        cores = int(ray.cluster_resources().get("CPU", 1))
        return min(cores, self._limit or cores)

    @property
    def workers_per_node(self) -> int:
        """Those of the largest node."""
        return max(1, min(self.workers, int(most("CPU"))))

    def map(
        self, task: Task[Item, Opened, Result], items: Sequence[Item], label: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run a task on every item (see `Engine.map`)."""
        if not items:
            return
        connect(self._limit, self._address)
        backlog = Backlog(
            items,
            label,
            task.name_of,
            attempts=self._attempts,
            first_pause_s=self._first_pause_s,
        )
        pool = self._pool_for(task.resources, label)
        yield from pool.run(task, self.limit_s(task.resources), backlog)
        self.retries += backlog.retries
        backlog.raise_failures()

    @property
    def is_one_machine(self) -> bool:
        """Whether the cluster has one node."""
        connect(self._limit, self._address)
        return len(nodes()) < 2

    def everywhere(self, task: Task[None, Opened, Result], label: str) -> list[tuple[str, Result]]:
        """Run a task once on each node that meets its needs (see `Engine.everywhere`).

        The workers of the last task go first, so that theirs is free.

        Raises:
            ConfigError: no node meets them.
            EngineError: a node is lost or does not answer.
        """
        connect(self._limit, self._address)
        import ray

        require_place(task.resources, label)
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        actors = {  # nodes of one host differ in their ids
            f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})": _actor_on(node, task.resources)
            for node in nodes()
            if fits(node, task.resources)
        }
        try:
            call = _Call.of(label, task.resources, self.limit_s(task.resources))
            sent = {name: actor.run.remote(call, task, None) for name, actor in actors.items()}
            return [(name, _answer_of(name, reference, label)) for name, reference in sent.items()]
        finally:
            for actor in actors.values():
                ray.kill(actor)

    def _pool_for(self, needed: Resources, label: str) -> "_ActorPool":
        """The pool of the last task where it fits, else a new one in its place.

        Raises:
            ConfigError: no node of the cluster can hold such a task.
        """
        require_place(needed, label)
        if self._pool is None or not self._pool.serves(needed):
            if self._pool is not None:
                self._pool.close()
            self._pool = _ActorPool(needed, self._limit)
        return self._pool


class _Worker:
    """Runs inside an actor: opens each task with its first item, then works on items."""

    def __init__(self, folder: str) -> None:
        # Relative paths mean the same as in the driver.
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._key = ""
        self._opened: Any = None

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, call: "_Call", task: Task[Item, Opened, Result], item: Item) -> Outcome[Result]:
        return Outcome.of(lambda: self._work_on(call, task, item))

    def _work_on(self, call: "_Call", task: Task[Item, Opened, Result], item: Item) -> Result:
        with Path(os.devnull).open("w") as nowhere, MemoryGuard(call.limit_bytes).watching():
            if self._key != call.key:
                with ending_after(max(call.limit_s, OPENING_S), nowhere):
                    self._open(call, task)
            with ending_after(call.limit_s, nowhere):
                return task(item, self._opened)

    def _open(self, call: "_Call", task: Task[Item, Opened, Result]) -> None:
        self._key, self._opened = "", None  # the last task's model goes first
        if private_bytes() > call.limit_bytes // 2:  # a tenth of a second, in every worker
            give_back()
        self._opened = task.open()
        self._key = call.key


@dataclass(frozen=True)
class _Call:
    """What all items of a map have in common, besides the task."""

    key: str
    limit_bytes: int
    """What a worker may hold."""
    limit_s: float
    """How long an item may take."""

    @classmethod
    def of(cls, key: str, needed: Resources, limit_s: float) -> "_Call":
        """Items of a task with these needs."""
        return cls(key, 2 * needed.memory + _LIBRARIES_BYTES, limit_s)


def _actor_on(node: Node, needed: Resources) -> "ActorHandle":
    """An actor on one node, which waits for nobody's cores."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    kind = ray.remote(_Worker).options(
        num_cpus=0, num_gpus=needed.gpus, max_restarts=0, scheduling_strategy=there
    )
    return kind.remote(str(Path.cwd()))


def _answer_of(name: str, reference: "ObjectRef", label: str) -> Any:
    """What an actor answers.

    Raises:
        EngineError: it does not; names its node. Errors of the task are raised as they are.
    """
    import ray

    try:
        outcome: Outcome[Any] = ray.get(reference, timeout=_SECONDS_TO_OPEN)
    except ray.exceptions.RayError as error:
        raise EngineError(f"{label}: node {name} does not answer: {one_line(error)}") from error
    return outcome.unwrap()


@dataclass(eq=False)
class _Actor:
    """One actor as the driver sees it."""

    handle: "ActorHandle"
    node: str | None = None
    """Where it runs; None while it waits for its place."""
    num_items: int = 0
    """Items that were sent to it and have not come back."""
    since: float = 0.0
    """When it began with the first of them, as far as the driver knows."""


class _ActorPool:
    """Actors with the same needs, each with a few items queued; a dead one is replaced.

    Up to twice as many are asked for as the cluster holds now (and no more than `limit`): those
    that wait are the demand by which an autoscaler grows it.
    """

    def __init__(self, needed: Resources, limit: int | None) -> None:
        import ray

        self.needed = needed
        self._limit = limit
        self._actor_class = ray.remote(_Worker).options(
            num_cpus=needed.cpus,
            num_gpus=needed.gpus,
            memory=int(min(needed.memory, most("memory"))),  # else it would fit no node
            max_restarts=0,
        )
        self._actors: list[_Actor] = []
        self._starting: dict[ObjectRef, _Actor] = {}
        self._running: dict[ObjectRef, tuple[_Actor, Any]] = {}
        """In the order in which they were sent."""
        self._looked = float("-inf")
        self._warned = time.monotonic()

    def run(
        self, task: Task[Item, Opened, Result], limit_s: float, backlog: Backlog[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Give (item, result) as they finish."""
        import ray

        self._call = _Call.of(uuid.uuid4().hex, task.resources, limit_s)
        stored = ray.put(task)
        self._looked = float("-inf")
        try:
            while len(backlog) or self._running:
                self._grow(len(backlog))
                self._submit(stored, backlog)
                for reference in self._next_done(backlog):
                    if reference in self._starting:
                        self._welcome(reference)
                    elif reference in self._running:  # not so if its actor was just replaced
                        yield from self._collect(reference, backlog)
        finally:
            self._running.clear()  # what an abandoned map had in flight is nobody's any more
            for actor in self._actors:
                actor.num_items = 0

    def serves(self, needed: Resources) -> bool:
        """Whether a task may run here: starting other actors would cost seconds.

        Where it needs more memory than the actors booked, every node must hold as many that do.
        Where it needs less, no more of them may fit the cluster, and none may still wait for its
        place.
        """
        own = self.needed
        if own == needed:
            return True
        if (own.cpus, own.gpus) != (needed.cpus, needed.gpus):
            return False
        if own.memory < needed.memory:
            return places(own) == places(needed)
        most = min(places(needed), self._limit or sys.maxsize)
        placed = sum(actor.node is not None for actor in self._actors)
        return places(own) >= most and placed >= min(most, len(self._actors))

    def close(self) -> None:
        """Stop the actors and free their resources."""
        import ray

        for actor in self._actors:
            ray.kill(actor.handle)

    def _grow(self, num_waiting: int) -> None:
        """Ask for more actors where the cluster has grown and items wait."""
        if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        wanted = min(self._limit or 2 * places(self.needed), num_waiting + len(self._running))
        while len(self._actors) < wanted:
            self._start()
        if any(actor.node for actor in self._actors):
            self._warned = self._looked
        elif self._looked - self._warned > _SECONDS_BETWEEN_WARNINGS:
            self._warned = self._looked
            logger.warning("no worker finds its place: others hold the Ray cluster's cores")

    def _start(self) -> None:
        handle = self._actor_class.remote(str(Path.cwd()))
        actor = _Actor(handle)
        self._actors.append(actor)
        self._starting[handle.node.remote()] = actor

    def _welcome(self, reference: "ObjectRef") -> None:
        """An actor has found its place.

        Raises:
            EngineError: it could not even start: the others would not either.
        """
        import ray

        actor = self._starting.pop(reference)
        try:
            actor.node = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            if getattr(error, "actor_init_failed", False):
                raise EngineError(f"Ray workers cannot start: {one_line(error)}") from error
            self._replace(actor)

    def _submit(self, task: "ObjectRef", backlog: Backlog[Item]) -> None:
        ready = [actor for actor in self._actors if actor.node is not None]
        while ready:
            actor = min(ready, key=lambda one: one.num_items)
            if actor.num_items >= _IN_FLIGHT_PER_WORKER or (item := backlog.pop()) is None:
                return
            self._running[actor.handle.run.remote(self._call, task, item)] = (actor, item)
            actor.since = actor.since if actor.num_items else time.monotonic()
            actor.num_items += 1

    def _next_done(self, backlog: Backlog[Item]) -> "list[ObjectRef]":
        """What finished, after at most a few seconds, or when the next item is due."""
        import ray

        pause_s = min(_SECONDS_BETWEEN_LOOKS, backlog.pause_s() or _SECONDS_BETWEEN_LOOKS)
        references = [*self._starting, *self._running]
        if not references:
            time.sleep(pause_s)
            return []
        done, _ = ray.wait(references, num_returns=1, timeout=pause_s)
        return list(done)

    def _collect(
        self, reference: "ObjectRef", backlog: Backlog[Item]
    ) -> Iterator[tuple[Item, Any]]:
        """Take an answer: give the result, or see to what went wrong."""
        import ray

        actor, item = self._running[reference]
        try:
            outcome: Outcome[Any] = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._bury(actor, error, backlog)
            return
        del self._running[reference]
        actor.num_items -= 1
        actor.since = time.monotonic()
        try:
            result = outcome.unwrap()
        except Exception as error:  # noqa: BLE001  (counted, retried, raised at the end)
            if isinstance(error, MemoryLimitError | MemoryError):  # the next item would fail, too
                self._bury(actor, None, backlog)
            backlog.failed(item, error)
        else:
            backlog.succeeded()
            yield item, result

    def _bury(self, actor: _Actor, error: Exception | None, backlog: Backlog[Item]) -> None:
        """Replace an actor; the item at hand is blamed for an error, those behind it go back."""
        items = [(ref, item) for ref, (where, item) in self._running.items() if where is actor]
        for number, (reference, item) in enumerate(items):
            del self._running[reference]
            if number or error is None:
                backlog.put(item)
            elif _node_was_lost(actor, error):
                logger.warning("node %s is lost; its shards are tried elsewhere", actor.node)
                backlog.lost(item, error)
            else:
                cause = self._cause_of_death(actor)
                logger.warning("shard %s: %s", backlog.name_of(item), cause)
                backlog.failed(item, cause)
        self._replace(actor)

    def _cause_of_death(self, actor: _Actor) -> Exception:
        limit_s = self._call.limit_s
        if time.monotonic() - actor.since >= limit_s:
            return TimeLimitError.after(limit_s)
        return WorkerDiedError("its worker process died")

    def _replace(self, actor: _Actor) -> None:
        import ray

        ray.kill(actor.handle)  # where it only cannot be reached
        self._actors.remove(actor)
        self._start()


def _node_was_lost(actor: _Actor, error: Exception) -> bool:
    """Whether a worker vanished with its node or its network, and not on its own."""
    import ray

    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return True
    return actor.node not in {node["NodeID"] for node in nodes()}
