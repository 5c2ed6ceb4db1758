"""Frozen, strict settings, read from YAML.

YAML -> JSON -> pydantic: strict JSON mode takes a list for a tuple and a string for a path,
and still refuses "3" for 3.
"""

import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from curation.errors import ConfigError
from curation.yaml_reader import MAX_CHARACTERS, parse_yaml

logger = logging.getLogger(__name__)


class Settings(BaseModel):
    """Base of all settings: frozen, strict, unknown keys refused, every field with a docstring."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Names of settings until the last version, and what they are called now."""

    def replace(self, **changes: Any) -> Self:
        """Give a validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes}, strict=False)


S = TypeVar("S", bound=BaseModel)

_MAX_PARENTS = 10


def check_name(name: str) -> str:
    """Give back what may name a recipe, a set or a side-car: it becomes part of paths and reasons.

    Raises:
        ValueError: it may not.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(
            "a name is 1 to 64 letters of ASCII, digits, '.', '_' and '-', and begins with no '.'"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


def read_yaml(path: Path) -> Any:
    """Read one YAML document.

    Raises:
        ConfigError: the file is missing or is not YAML.
    """
    if not _is_file(path):
        raise ConfigError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read YAML that holds keys; an empty file holds none.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else.
    """
    values = read_yaml(path)
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: want a mapping of keys, found {type(values).__name__}")
    return values or {}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def find_config(kind: str, name: str) -> Path:
    """Path of a YAML file, given itself or by the name of one that ships in configs/<kind>.

    Raises:
        ConfigError: neither is there; names those that ship.
    """
    given = Path(name)
    if _is_file(given) or given.suffix in (".yaml", ".yml"):
        return given
    folder = Path(str(resources.files("configs").joinpath(kind)))
    shipped = folder / f"{name}.yaml"
    if not _is_file(shipped):
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(f"{name}: neither a file nor one of configs/{kind}: {names}")
    return shipped


def split_change(change: str) -> tuple[str, Any]:
    """Read KEY=VALUE, as --set gives it; the value is YAML.

    Raises:
        ConfigError: there is no "=", or the value is not YAML.
    """
    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change}: want key=value, such as optim.steps=100")
    return key.strip(), parse_yaml(text, f"--set {change}")


def apply_changes(values: dict[str, Any], changes: Iterable[str]) -> None:
    """Put several KEY=VALUE into nested values; dots in a key lead into inner settings.

    Of plain values given for one key the last counts.

    Raises:
        ConfigError: not KEY=VALUE, a key leads into something that is no settings, or a change
            would take back a list or settings of an earlier one.
    """
    given: dict[str, Any] = {}
    for change in changes:
        key, value = split_change(change)
        for earlier, old in given.items():
            same = earlier == key and isinstance(old, list | dict)
            if same or earlier.startswith(f"{key}."):
                raise ConfigError(
                    f"--set {change}: takes back what --set {earlier}=… says; give all of "
                    f"'{key}' in one --set"
                )
        _put(values, key, value, change)
        given[key] = value


def _put(values: dict[str, Any], key: str, value: Any, change: str) -> None:
    *parents, last = key.split(".")
    if len(parents) > _MAX_PARENTS:
        raise ConfigError(f"--set {change}: no settings lie so deep")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change}: '{parent}' holds a value, not settings")
        values = inner
    values[last] = value


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Replace keys, inside nested settings too."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            result[key] = laid_over(inner, value)
        else:
            result[key] = value
    return result


def parse_settings(model: type[S], values: Any, where: str) -> S:
    """Validate plain YAML values into settings.

    `where` names the file (and the place in it) in errors.

    Raises:
        ConfigError: one line that names the key, what was found and what is allowed.
    """
    try:
        values = _with_new_names(model, {} if values is None else values, where)
        text = json.dumps(values, default=str)
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(model, error, where)) from error


def _with_new_names(model: Any, values: Any, where: str) -> Any:
    """Settings under the names that they have now; a warning for each that was renamed."""
    if not isinstance(values, dict) or not isinstance(model, type):
        return values
    renamed = model.renamed if issubclass(model, Settings) else {}
    found = {}
    for key, value in values.items():
        name = renamed.get(key, key)
        if name != key and name not in values:
            logger.warning("%s: '%s' is now called '%s'; write that instead", where, key, name)
            key = name
        field = getattr(model, "model_fields", {}).get(key)
        found[key] = value if field is None else _with_new_names(field.annotation, value, where)
    return found


def describe_validation_error(model: type[BaseModel], error: ValidationError, where: str) -> str:
    """Put the first of pydantic's errors, and the number of the others, into one line."""
    # A misspelled key is both unknown and missing: say the former.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1])
        return f"{where}: unknown key '{key}'{_nearest(str(first['loc'][-1]), known)}{others}"
    if first["type"] == "missing":
        return f"{where}: key '{key}' is missing{others}"
    if not first["loc"]:  # a check of several settings names them itself
        return f"{where}: {first['msg'].removeprefix('Value error, ')}{others}"
    found = json.dumps(first["input"], default=str)[:80]
    hint = _number_hint(first["input"])
    return (
        f"{where}: '{key}' is {found}: {first['msg'].removeprefix('Value error, ')}{hint}{others}"
    )


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the settings at a location inside `model`."""
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(str(part))
        current = field.annotation if field is not None else current
    return list(getattr(current, "model_fields", {}))


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known keys: {', '.join(sorted(known))}" if known else ""


def _number_hint(value: Any) -> str:
    """YAML 1.1 reads 1e-4 as text: say how to write it."""
    if not isinstance(value, str) or "e" not in value.lower():
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " (YAML reads this as text: write 1.0e-4, or 1.0e+3)"
