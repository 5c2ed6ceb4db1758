"""How many rows a threshold would take away, counted on the scores that the run wrote down."""

import numpy as np
from numpy.typing import NDArray

from pipelines.audit.tables import Tables
from pipelines.audit.work_folder import WorkFolder
from pipelines.run.run_record import POOL
from pipelines.web.calibration.curves import Effects, Floats
from pipelines.web.calibration.questions import SCORES, Kind
from pipelines.web.serving.catalog import Catalog


def effects_of(catalog: Catalog, work: WorkFolder, kind: Kind, thresholds: Floats) -> Effects:
    """Rows above each threshold, and rows that it would drop.

    A duplicate falls only if another image of its group stays. Groups are those of each row's most
    similar other row, which is what the run keeps: pairs beyond it may join groups further, so
    the true number is this or a little more.
    """
    name = SCORES[kind]
    size = catalog.size(name)
    above = np.array([size - catalog.rank_above(name, float(t)) for t in thresholds], np.int64)
    if kind is not Kind.dedup:
        return Effects(thresholds, above, above)
    return Effects(thresholds, above, _merged(work, thresholds))


def _merged(work: WorkFolder, thresholds: Floats) -> NDArray[np.int64]:
    """(T,) rows of the pool less their groups, of the pairs above each threshold."""
    import pandas as pd
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    stage = work.deciding(POOL, "component")
    with Tables() as tables:
        if stage is None or not tables.add("verdicts", stage.decisions):
            return np.zeros(len(thresholds), np.int64)
        pairs = tables.columns_of(
            "select id, twin, similarity::double as similarity from verdicts where twin is not null"
        )
    codes, names = pd.factorize(np.concatenate([pairs["id"], pairs["twin"]]))
    left, right = codes.reshape(2, -1)  # (2, pairs)
    removed = []
    for threshold in thresholds:
        near = pairs["similarity"] > threshold
        graph = coo_array((np.ones(near.sum()), (left[near], right[near])), (len(names),) * 2)
        removed.append(len(names) - connected_components(graph, directed=False)[0])
    return np.array(removed, np.int64)
