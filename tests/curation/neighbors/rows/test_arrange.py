from curation.neighbors.rows.arrange import rows_per_task

GB = 10**9


def test_rows_per_task__files_that_meet_grow_like_the_rows():
    def reads(num_rows):
        return (num_rows / rows_per_task(num_rows, 1024, 4 * GB)) ** 2

    assert reads(1_200_000_000) < 20e6
    assert reads(1_200_000_000) / 1_200_000_000 < 1.1 * reads(270_000_000) / 270_000_000


def test_rows_per_task__never_more_than_memory_holds():
    for num_rows in (1, 100_000, 10_000_000, 1_200_000_000):
        for memory in (10**6, 4 * GB):
            assert 1 <= rows_per_task(num_rows, 1024, memory) * 6 * 1024 <= max(memory, 6 * 1024)


def test_rows_per_task__a_small_pool_has_work_for_several():
    assert 1_000_000 / rows_per_task(1_000_000, 1024, 4 * GB) >= 15
