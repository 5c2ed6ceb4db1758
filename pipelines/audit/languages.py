"""Languages of alternative texts, told from a sample of them."""

import importlib.util
from collections import Counter

from curation.dataset import Dataset
from pipelines.audit.tables import Row, select

SAMPLED_TEXTS = 5_000
"""Rows are in the order of their ids, which are hashes: the first ones are a random sample."""
_LEAST_LETTERS = 12
"""Shorter texts hardly tell."""
TOO_SHORT = "too short to tell"
NOT_TOLD = "not told: pip install 'lvd-curate[languages]'"
"""In place of languages, where the package that tells them is not installed."""


def alt_languages(dataset: Dataset | None) -> list[Row]:
    """Languages (ISO 639-1) of the column `alt`, the most common first; none without texts."""
    if dataset is None or "alt" not in dataset.columns:
        return []
    query = "select alt from rows where alt is not null and alt != '' limit ?"
    texts = select(dataset, query, [SAMPLED_TEXTS])
    if texts and importlib.util.find_spec("py3langid") is None:
        return [{"language": NOT_TOLD, "rows_of_sample": len(texts), "share": 1.0}]
    counts = Counter(language_of(str(row["alt"])) for row in texts)
    return [
        {"language": language, "rows_of_sample": rows, "share": rows / len(texts)}
        for language, rows in sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    ]


def language_of(text: str) -> str:
    """The most likely language of one text."""
    if sum(letter.isalpha() for letter in text) < _LEAST_LETTERS:
        return TOO_SHORT
    import py3langid  # its model takes a second to load: only where there are texts

    return str(py3langid.classify(text)[0])
