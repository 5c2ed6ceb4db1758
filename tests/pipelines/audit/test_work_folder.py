import pytest

from curation.errors import DatasetError
from curation.stage import DECISIONS
from pipelines.audit.funnel import adds_up, funnel, set_funnels
from pipelines.audit.work_folder import WorkFolder
from tests.pipelines.audited_run import finished_run


@pytest.fixture(scope="module")
def work():
    return WorkFolder(str(finished_run()))


def test_output__of_the_last_stage_that_made_it(work):
    images = work.output("pool", "images")
    assert images.num_rows == work.making("pool", "images").entry.record.rows_out
    assert work.output("pool", "no such output") is None
    assert set(work.hits.columns) >= {"seed_set", "rank", "similarity"}


def test_stages__of_the_union_know_where_each_flow_lies(work):
    for stage in work.stages("pool"):
        assert sum(number for _, number in stage.ranges.values()) == stage.decisions.num_shards
        assert stage.output(DECISIONS) is stage.decisions
    union = [stage for stage in work.stages("pool") if stage.is_union]
    assert union
    assert set(union[0].ranges) == {"pool", "taken"}
    taken = work.output("taken", "rows").read(["id"])["id"].to_pylist()
    for stage in union:
        for row_id in taken:
            held = stage.decisions.read_shard(stage.shard_of(row_id, "taken"), ["id"])
            assert row_id in held["id"].to_pylist()


def test_record__no_run_there(tmp_path):
    assert not WorkFolder.is_one(str(tmp_path))
    with pytest.raises(DatasetError, match="no finished run there"):
        _ = WorkFolder(str(tmp_path)).record


def test_funnel__every_row_is_accounted_for(work):
    rows = funnel(work.record)
    assert adds_up(rows)
    assert all(adds_up(some) for some in set_funnels(work.record).values())
    assert [row.added for row in rows if row.added] == [3]
    dropped = next(row for row in rows if row.stage == "canonicalize")
    assert dropped.num_dropped == sum(dropped.dropped.values()) == 1
    assert dropped.reasons == "truncated 1"
