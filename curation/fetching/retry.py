"""Which rows of an earlier download may succeed now."""

import pyarrow as pa
import pyarrow.compute as pc

from curation.dataset import Dataset, write_dataset
from curation.fetching.outcomes import TEMPORARY
from curation.schema import ID, KEEP, REASON, schema_of


def retryable_rows(decisions: Dataset, folder: str) -> Dataset:
    """Decisions that keep alive only rows which failed for a reason that may pass.

    decisions: of an earlier `download`. Put in force over the same rows
    (`pool.with_stage({}, retryable)`), they let the next download fetch these rows alone. Written
    to `folder`, shard by shard; opt-outs and permanent failures are never asked again.
    """
    schema = schema_of([ID, KEEP, REASON])
    return write_dataset(
        folder, (_judged(decisions, index) for index in range(decisions.num_shards)), schema
    )


def _judged(decisions: Dataset, index: int) -> pa.Table:
    table = decisions.read_shard(index, [ID, REASON])
    keep = pc.is_in(table[REASON], value_set=pa.array(TEMPORARY, pa.string()))
    return table.append_column(KEEP, keep).select([ID, KEEP, REASON])
