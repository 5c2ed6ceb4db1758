"""The nodes of a Ray cluster: how to join it, what they have, and what fits."""

import logging
import os
import socket
from typing import TypedDict

from curation.errors import ConfigError
from curation.stage import Resources

_SECONDS_TO_ANSWER = 5.0


class Node(TypedDict):
    """What Ray says of a node."""

    NodeID: str
    NodeManagerHostname: str
    Resources: dict[str, float]
    """CPU, GPU and memory in bytes, as far as it has them."""


def connect(workers: int | None, address: str | None) -> None:
    """Join the cluster at an address, or start one here with as many cores as workers.

    Raises:
        ConfigError: nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # guarantee 5: no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **options)
        else:
            # "local": without it Ray would join a cluster that somebody else started here.
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray answers at {address or 'this machine'}: {error}; check --address and "
            "RAY_ADDRESS, or leave both out to start Ray here"
        ) from error


def _knock(address: str) -> None:
    """Look whether anything listens: Ray itself would try for five minutes, then end the process.

    Raises:
        OSError, ValueError: nothing does.
    """
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host:  # not so for "auto" and "local"
        with socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER):
            pass


def nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def most(kind: str) -> float:
    """What the node with the most of one resource has of it."""
    return max((node["Resources"].get(kind, 0) for node in nodes()), default=0)


def places(needed: Resources) -> int:
    """Actors with these needs that fit the nodes of the cluster as it is, each in one node."""
    return sum(fits(node, needed) for node in nodes())


def fits(node: Node, needed: Resources) -> int:
    """Actors that fit a node. One that has less memory than a task's peak still takes one."""
    has = node["Resources"]
    wanted = {"CPU": needed.cpus, "GPU": needed.gpus}
    counts = [int(has.get(kind, 0) // amount) for kind, amount in wanted.items() if amount]
    if needed.memory:
        counts.append(max(1, int(has.get("memory", 0) // needed.memory)))
    return min(counts)


def require_place(needed: Resources, label: str) -> None:
    """Refuse a task that no node can hold.

    Raises:
        ConfigError: says what the largest nodes have.
    """
    if not places(needed):
        raise ConfigError(
            f"{label}: a task needs {needed.cpus:g} CPUs and {needed.gpus:g} GPUs, the largest of "
            f"{len(nodes())} nodes of the Ray cluster has {most('CPU'):g} and {most('GPU'):g}; add "
            "nodes or lower the stage's needs"
        )
