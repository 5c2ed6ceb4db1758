"""Which rows take part in a join, and which of them are not compared with each other.

One byte a row by position, in a file that every task of the join reads its part of.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from curation.neighbors.rows.row_files import RowFiles, write_array


def write_active(
    files: RowFiles, path: str, sets: Sequence[int], dropped: Iterable[np.ndarray] = ()
) -> str:
    """Write which positions take part in a join: those of some sets, less the dropped.

    dropped: (B,) int64 positions each.
    """
    active = np.empty(files.num_rows, bool)
    for partition in range(files.num_partitions):
        own = slice(*files.starts[partition : partition + 2])
        active[own] = np.isin(files.rows(partition)["set"], sets)
    for positions in dropped:
        active[positions] = False
    write_array(path, active)
    return path


def write_exempt(files: RowFiles, path: str, first_base: int) -> str:
    """Write which positions are not compared with each other: those of the base.

    But a row of the base stands for identical ones of the pool, and is then compared as they are.
    first_base: number of the first set of the base.
    """
    exempt = np.empty(files.num_rows, bool)
    for partition in range(files.num_partitions):
        rows = files.rows(partition)
        first, sets = rows["first"], rows["set"]
        stands_for_new = np.zeros(len(sets), bool)
        stands_for_new[first[sets == 0]] = True
        own = slice(*files.starts[partition : partition + 2])
        exempt[own] = (sets >= first_base) & ~stands_for_new[first]
    write_array(path, exempt)
    return path
