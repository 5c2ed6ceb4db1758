import numpy as np
import pytest

from curation.errors import DatasetError
from curation.neighbors.rows import unique_ids
from curation.neighbors.rows.unique_ids import check_unique_ids
from curation.neighbors.rows.vectors import VectorSource
from curation.schema import make_id
from pipelines.engines.local_engine import LocalEngine

IDS = [make_id(str(number)) for number in range(60)]


@pytest.mark.parametrize("per_bucket", [7, 1 << 20])
@pytest.mark.parametrize("twice", [(), (3,), (3, 50)])
def test_check_unique_ids__names_one_that_stands_in_two_shards(
    embed, tmp_path, monkeypatch, per_bucket, twice
):
    monkeypatch.setattr(unique_ids, "_IDS_PER_BUCKET", per_bucket)
    ids = [*IDS, *(IDS[number] for number in twice)]
    pool = embed(np.ones((len(ids), 4)), ids=ids, sizes=[20, 0, len(ids) - 20])
    arguments = (VectorSource(pool, "copy"), [range(1), range(1, 3)], str(tmp_path), LocalEngine())
    if not twice:
        check_unique_ids(*arguments)
        return
    smallest = min(IDS[number] for number in twice)
    with pytest.raises(DatasetError, match=rf"{smallest} occurs twice; ids must be unique"):
        check_unique_ids(*arguments)
