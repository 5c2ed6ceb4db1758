"""Drops images whose hashes are on lists of known-bad ones.

`canonicalize` asks the same lists before it stores an image; this stage is for images that were
stored before a list was known.
"""

import numpy as np
import pyarrow as pa

from curation.blocklists import BlockIndex, Blocklists, RowHashes, md5_of, reject_listed
from curation.schema import schema_of
from curation.stage import Resources, Shard, ShardStage


class Blocklist(ShardStage):
    """What is on a list is dropped; its id, the list's name and the time remain."""

    lists: Blocklists
    """The lists. MD5 needs the fetched bytes (column raw), which exist only if they were kept."""

    reasons = ("blocklist:NAME",)
    judges_images = True
    shows_dropped = "hidden"

    def required_columns(self) -> tuple[str, ...]:
        """Hashes of the original bytes and of the picture."""
        return ("sha256", "phash", "phash_quality", *(("raw",) if self.lists.md5 else ()))

    def outputs(self) -> dict[str, pa.Schema]:
        """When a row was found on a list; null for all others."""
        return {"blocked": schema_of(["id", "blocklist", "blocked_at"])}

    def varying_outputs(self) -> tuple[str, ...]:
        """Times differ from run to run."""
        return ("blocked",)

    def decision_columns(self) -> pa.Schema:
        """Name of the list."""
        return schema_of(["blocklist"])

    def fingerprint(self) -> str:
        """Digest of the lists' content."""
        return self.lists.fingerprint()

    def resources(self) -> Resources:
        """What one shard's task needs."""
        return Resources(cpus=1, memory=2 << 30)

    def open(self) -> BlockIndex:
        """Read the lists."""
        return self.lists.load()

    def process(self, shard: Shard, opened: BlockIndex) -> None:
        """Look every row up."""
        raw = shard.values("raw") if self.lists.md5 else []
        hashes = RowHashes(
            sha256=shard.values("sha256"),
            phash=shard.values("phash"),
            phash_quality=shard.values("phash_quality"),
            md5=[md5_of(data or b"") for data in raw],
        )
        reject_listed(shard, opened, np.arange(shard.num_rows), hashes)
