"""Settings that depend on the machines at work, such as `precision: auto`: settled once.

A run that goes on elsewhere keeps what was settled when it began, and so its keys and its work.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import JsonValue

from curation import storage
from curation.config import parse_settings
from curation.stage import Engine, Stage


def settled_file(work: str) -> str:
    """Where a work folder remembers it."""
    return storage.join(work, "work", "_settled.json")


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
        key = _key_of(stage)
        if key not in self._done:
            remembered = self._remembered()
            settled = self.recalled(stage).settled(self.engine)
            self._done[key] = settled.informed(self.engine)
            if settled != stage and key not in remembered:
                values = {**remembered, key: settled.model_dump(mode="json")}
                storage.write_json(self.file, values)
        return self._done[key]

    def recalled(self, stage: Stage) -> Stage:
        """The stage as it was settled before, in this work folder or in an earlier run."""
        remembered = self._remembered().get(_key_of(stage))
        if remembered is not None:
            return parse_settings(type(stage), remembered, self.file)
        return self.earlier(stage) if self.earlier else stage

    def _remembered(self) -> dict[str, JsonValue]:
        return dict(storage.read_json(self.file)) if storage.exists(self.file) else {}


def _key_of(stage: Stage) -> str:
    return f"{stage.name()} {stage.model_dump_json()}"
