"""The time that a run will still take: by its plan at the pace so far, else by its shards."""

from collections.abc import Mapping


class Forecast:
    """Hears what a run has done and what its plan gave for it.

    Steps are stages by name, such as `embed`, and those of sets with the set before a slash.
    """

    def __init__(self, planned: Mapping[str, float] | None = None) -> None:
        """planned: seconds by step, as `curate plan` predicted them."""
        self._ahead = dict(planned or {})
        self._planned_s = self._taken_s = 0.0

    def planned_s(self, step: str) -> float | None:
        """Seconds that a step which has not finished was planned to take."""
        return self._ahead.get(step)

    @property
    def pace(self) -> float | None:
        """Seconds that finished steps took for each planned one; None before the first."""
        return self._taken_s / self._planned_s if self._planned_s else None

    def finished(self, step: str, seconds: float, *, reused: bool = False) -> None:
        """A step is done; one that was found done says nothing of the pace."""
        planned_s = self._ahead.pop(step, None)
        if planned_s is not None and not reused:
            self._planned_s += planned_s
            self._taken_s += seconds

    def left_of_step(self, step: str, since_s: float, share: float) -> float | None:
        """Seconds left of the running step; None where nothing is known.

        since_s: seconds since it began, or went on; share: of the work then left that is done.
        """
        if share > 0:
            return since_s * (1 - share) / share
        planned_s = self._ahead.get(step)
        return None if planned_s is None else max(0.0, planned_s * (self.pace or 1.0) - since_s)

    def left_of_run(self, step: str | None, since_s: float, share: float) -> float | None:
        """Seconds left of all planned steps; None without a plan."""
        if not self._ahead:
            return None
        here = (self.left_of_step(step, since_s, share) if step else None) or 0.0
        others = sum(seconds for name, seconds in self._ahead.items() if name != step)
        return here + others * (self.pace or 1.0)


def share_done(total: int, before: int, done: int) -> float:
    """Share of the shards that waited when a step began, or went on, which are done since.

    before: shards that were done then; done: those that are done now.
    """
    waiting = total - before
    return (done - before) / waiting if waiting else 0.0


def step_name(set_name: str, stage: str) -> str:
    """The stage, and of a set SET/STAGE. set_name: empty for the pool."""
    return f"{set_name}/{stage}" if set_name else stage
