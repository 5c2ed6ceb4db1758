"""A Ray cluster as a plan sees it: its cores and devices, and how fast they are."""

import re
from pathlib import Path

from pydantic import Field, JsonValue

from curation.config import Settings, parse_settings, read_yaml
from curation.errors import ConfigError

_STATED_GPU_SPEED = {"T4": 60.0, "V100": 120.0, "A100": 300.0, "H100": 600.0, "H200": 600.0}
"""Forward passes of a device against one core, as a rough statement: measure yours."""
_TEXT = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z]+\d*)")


class ClusterSpec(Settings):
    """Nodes that are alike. Speeds are against one core of the machine that measured the sample."""

    nodes: int = Field(default=1, ge=1)
    """Machines."""
    cpus: int = Field(default=1, ge=1)
    """Cores of a node."""
    gpus: int = Field(default=0, ge=0)
    """Devices of a node."""
    cpu_speed: float = Field(default=1.0, gt=0)
    """A core there against a core here."""
    gpu_speed: float = Field(default=1.0, gt=0)
    """A device there against a core here, in forward passes of the recipe's encoders."""
    network_gb_s: float = Field(default=1.25, gt=0)
    """GB/s of a node to storage and to the web."""

    @property
    def cores(self) -> int:
        """Cores of all nodes."""
        return self.nodes * self.cpus

    @property
    def devices(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.gpus


def read_cluster(text: str, cores: int | None) -> ClusterSpec:
    """Read a YAML file of rates, or NODESxDEVICESxKIND and rates: 20x8xV100,network_gb_s=3.

    cores: of a node, where the text does not say; else one.

    Raises:
        ConfigError: it is neither.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        return parse_settings(ClusterSpec, read_yaml(Path(text)), text)
    shape, *rates = text.split(",")
    match = _TEXT.fullmatch(shape)
    kind = match.group(3).upper() if match else ""
    if match is None or kind not in _STATED_GPU_SPEED:
        raise ConfigError(
            f"--cluster {text}: write NODESxDEVICESxKIND such as 20x8xV100, and what is known of "
            f"a node, such as 20x8xV100,cpus=40, or a YAML file; kinds: "
            f"{', '.join(_STATED_GPU_SPEED)}"
        )
    values: dict[str, JsonValue] = {"nodes": int(match.group(1) or 1), "gpus": int(match.group(2))}
    values |= {"gpu_speed": _STATED_GPU_SPEED[kind], **({"cpus": cores} if cores else {})}
    for rate in rates:
        key, _, value = rate.partition("=")
        values[key.strip()] = _number(value, text)
    return parse_settings(ClusterSpec, values, f"--cluster {text}")


def _number(value: str, text: str) -> float | int:
    try:
        return int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ConfigError(f"--cluster {text}: {value!r} is no number") from None
