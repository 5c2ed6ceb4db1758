"""How a seed set draws from the pool: the settings of rule sample and of rule cluster."""

from typing import Literal

from pydantic import Field

from curation.config import Settings


class SeedRule(Settings):
    """How one seed set draws from the pool."""

    set: str
    """Name of the seed set."""
    rule: Literal["sample", "cluster"]
    """sample: nearest images of each seed. cluster: images of the clusters that seeds fall into."""
    k: int = Field(default=4, ge=1, le=10_000)
    """sample: images a seed."""
    per_cluster: int = Field(default=10_000, ge=1)
    """cluster: images from each cluster, at most."""
    min_hits: int = Field(default=4, ge=1)
    """cluster: seeds that a cluster must hold (the paper's "more than 3")."""
    cap: int = Field(default=1_000_000, ge=1)
    """cluster: images of the set, at most."""
