"""One calibration: its questions, its answers, and what follows from them."""

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np

from pipelines.audit.work_folder import WorkFolder
from pipelines.web.calibration.curves import Effects, Point, by_bin, curve
from pipelines.web.calibration.judgements import Judgements
from pipelines.web.calibration.questions import Kind, Question, Sample
from pipelines.web.calibration.removals import effects_of
from pipelines.web.serving.catalog import Catalog

_STEPS = 25


@dataclass(frozen=True)
class Lab:
    """A sample and its answers."""

    work: WorkFolder
    catalog: Catalog
    sample: Sample
    judgements: Judgements
    seed: int

    @property
    def kind(self) -> Kind:
        """Which threshold is calibrated."""
        return self.sample.kind

    @cached_property
    def questions(self) -> list[Question]:
        """Every pair or image once, bins in turn, so that few answers already tell of all bins."""
        turns = zip_longest(*(stratum.questions for stratum in self.sample.strata))
        flat = [question for turn in turns for question in turn if question is not None]
        return list({question.key: question for question in flat}.values())

    @cached_property
    def effects(self) -> Effects:
        """What each threshold does, counted in the whole run."""
        low, high = self.sample.strata[0].low, self.sample.strata[-1].high
        steps = {round(float(one), 6) for one in np.linspace(low, high, _STEPS)}
        own = self.sample.threshold
        thresholds = np.array(sorted(steps | ({own} if own is not None else set())), np.float64)
        return effects_of(self.catalog, self.work, self.kind, thresholds)

    def next(self, answers: dict[str, bool | None]) -> int | None:
        """Number of the first question without an answer."""
        open_ones = (n for n, one in enumerate(self.questions) if one.key not in answers)
        return next(open_ones, None)

    def points(self, answers: dict[str, bool | None]) -> list[Point]:
        """Precision, recall and removals by threshold."""
        return curve(self.sample, answers, self.effects, np.random.default_rng(self.seed))

    def figures(self) -> dict[str, Any]:
        """Everything, for machines."""
        answers = self.judgements.read()
        return {
            "kind": str(self.kind),
            "threshold": self.sample.threshold,
            "questions": len(self.questions),
            "answered": sum(one.key in answers for one in self.questions),
            "bins": by_bin(self.sample, answers),
            "curve": [asdict(point) for point in self.points(answers)],
            "removals": [
                {"threshold": float(t), "above": int(above), "removed": int(removed)}
                for t, above, removed in zip(
                    self.effects.thresholds, self.effects.above, self.effects.removed, strict=True
                )
            ],
        }
