"""Settings that depend on the machines at work, such as `precision: auto`: settled once.

A run that goes on elsewhere keeps what was settled when it began, and so its keys and its work.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from curation import storage
from curation.config import parse_settings
from curation.stage import Engine, Stage


@dataclass
class Settling:
    """Settles the stages of one run, and remembers how in a file."""

    engine: Engine
    file: str
    earlier: Callable[[Stage], Stage] | None = None
    """Gives a stage as an earlier run had it settled, as far as it did."""
    _done: dict[str, Stage] = field(default_factory=dict)

    def settle(self, stage: Stage) -> Stage:
        """The stage as it is to run here: nothing left open, its models known."""
        key = f"{stage.name()} {stage.model_dump_json()}"
        if key not in self._done:
            remembered = self._remembered()
            settled = self._settled(stage, remembered.get(key))
            self._done[key] = settled.informed(self.engine)
            if settled != stage and key not in remembered:
                values = {**remembered, key: settled.model_dump(mode="json")}
                storage.write_json(self.file, values)
        return self._done[key]

    def _settled(self, stage: Stage, remembered: dict[str, Any] | None) -> Stage:
        if remembered is not None:
            return parse_settings(type(stage), remembered, self.file)
        before = self.earlier(stage) if self.earlier else stage
        return before.settled(self.engine)

    def _remembered(self) -> dict[str, Any]:
        return dict(storage.read_json(self.file)) if storage.exists(self.file) else {}
