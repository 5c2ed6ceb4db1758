"""Several filters in one pass over the rows, which decodes each image once: `curate filter`.

Each row's score and threshold are those of the filter that dropped it, and else of the last one.
"""

from itertools import groupby
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from curation.config import parse_settings
from curation.errors import ConfigError
from curation.image_filter import ImageFilter, filter_in_turn
from curation.registry import load_stage
from curation.stage import DECISIONS, Resources, Shard, ShardStage


class Filters(ShardStage):
    """A chain of filters whose decisions go into one table."""

    version = 2

    filters: tuple[dict[str, dict[str, Any]], ...] = Field(min_length=1)
    """The filters in order: one name with its settings each."""

    @model_validator(mode="after")
    def _all_judge_rows(self) -> "Filters":
        try:
            built = self.chain
        except ConfigError as error:
            raise ValueError(str(error)) from error
        for stage in built:
            if not (isinstance(stage, ShardStage) and stage.judges_images):
                raise ValueError(f"'{stage.name()}' is no filter: it does not judge single images")
            if stage.set_names():
                raise ValueError(
                    f"'{stage.name()}' compares with the sets {', '.join(stage.set_names())}, "
                    "which only a recipe has; leave them out here"
                )
        return self

    @property
    def chain(self) -> list[ShardStage]:
        """The filters, built."""
        return [
            parse_settings(load_stage(name, "filters"), settings, name)  # type: ignore[misc]
            for entry in self.filters
            for name, settings in entry.items()
        ]

    @property
    def reasons(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant elsewhere
        """Reasons of all filters."""
        return tuple(reason for stage in self.chain for reason in stage.reasons)

    def required_columns(self) -> tuple[str, ...]:
        """Columns that the filters read."""
        return tuple(
            dict.fromkeys(name for stage in self.chain for name in stage.required_columns())
        )

    def optional_columns(self) -> tuple[str, ...]:
        """Columns that the filters read where they are."""
        return tuple(
            dict.fromkeys(name for stage in self.chain for name in stage.optional_columns())
        )

    def varying_outputs(self) -> tuple[str, ...]:
        """Outputs of the filters that differ from run to run."""
        return tuple(name for stage in self.chain for name in stage.varying_outputs())

    def outputs(self) -> dict[str, pa.Schema]:
        """Side-cars of all filters, such as face boxes."""
        found = {name: schema for stage in self.chain for name, schema in stage.outputs().items()}
        return {name: schema for name, schema in found.items() if name != DECISIONS}

    def decision_columns(self) -> pa.Schema:
        """A score column a filter."""
        return pa.schema([field for stage in self.chain for field in stage.decision_columns()])

    def fingerprint(self) -> str:
        """What the content depends on beside settings and inputs."""
        return " ".join(
            f"{stage.name()} {stage.version} {stage.fingerprint()}" for stage in self.chain
        )

    def resources(self) -> Resources:
        """The most that any filter needs."""
        needs = [stage.resources() for stage in self.chain]
        return Resources(
            cpus=max(one.cpus for one in needs),
            gpus=max(one.gpus for one in needs),
            memory=max(one.memory for one in needs),
        )

    def open(self) -> list[tuple[ShardStage, Any]]:
        """Open every filter."""
        return [(stage, stage.open()) for stage in self.chain]

    def process(self, shard: Shard, opened: list[tuple[ShardStage, Any]]) -> None:
        """Pass the shard through the filters."""
        for _, group in groupby(opened, lambda one: isinstance(one[0], ImageFilter)):
            chain = list(group)
            looking = [(one, state) for one, state in chain if isinstance(one, ImageFilter)]
            if looking:
                filter_in_turn(shard, looking)
            else:
                for stage, state in chain:
                    stage.process(shard, state)
