"""Finds stages by the names of their files."""

import difflib
import importlib
import pkgutil

import curation.stages
from curation.errors import ConfigError
from curation.stage import Stage


def stage_names() -> list[str]:
    """Names of all stages, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(curation.stages.__path__))


def load_stage(name: str, where: str) -> type[Stage]:
    """The class of the stage in `curation/stages/<name>.py`.

    Raises:
        ConfigError: there is no such stage; names the nearest.
    """
    known = stage_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
        raise ConfigError(f"{where}: no stage '{name}'; {hint}")
    module = importlib.import_module(f"curation.stages.{name}")
    wanted = "".join(part.title() for part in name.split("_"))
    stage: type[Stage] = getattr(module, wanted)
    return stage
