"""Generates the page of stages and their settings from the classes themselves."""

import inspect
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from curation.registry import load_stage, stage_names
from curation.stage import Stage

_INTRO = """# Stages and their settings

The stages of a recipe, with what `--set` and YAML may change; each is a class in `curation.stages`.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page before links are checked."""
    files.append(File.generated(config, "stages.md", content=page()))
    return files


def page() -> str:
    """The page: a heading, a sentence and a table for each stage."""
    return "\n".join([_INTRO, *(_section(load_stage(name, "docs")) for name in stage_names())])


def _section(stage: type[Stage]) -> str:
    rows = [
        f"| `{name}` | {_cell(_type_of(field.annotation))} | {_cell(_default_of(field))} "
        f"| {_prose(field.description)} |"
        for name, field in stage.model_fields.items()
    ]
    table = ["| setting | type | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    fixed = stage.reasons if isinstance(stage.reasons, tuple) else ()  # else they follow settings
    reasons = ", ".join(f"`{reason}`" for reason in fixed)
    dropped = f"\nDrops rows as {reasons}.\n" if reasons else ""
    return "\n".join([f"## {stage.name()}\n", _prose(inspect.getdoc(stage)), dropped, *table, ""])


def _type_of(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(?:typing|[a-z_.]+)\.(\w+)", r"\1", text)


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return repr(field.get_default(call_default_factory=True))


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`" if text != "required" else text


def _prose(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").split())
