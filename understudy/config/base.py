"""Sections that refuse what they do not know, and how a run's TOML becomes one."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from understudy.errors import ConfigError


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings kept for --help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def read_values(path: Path) -> dict[str, Any]:
    """Read a TOML file, or a JSON file by its suffix. Raises ConfigError naming file and place."""
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return values
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; name one with --config") from None
    except ValueError as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of values with `section.key=value` overrides set; values are TOML literals.

    A value that is no TOML literal is taken as a string: `run.name=second` works unquoted.
    """
    merged: dict[str, Any] = json.loads(json.dumps(values))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or "." not in dotted:
            raise ConfigError(f"override {override!r} is not section.key=value")
        *parents, leaf = dotted.strip().split(".")
        target = merged
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        target[leaf] = _literal(text.strip())
    return merged


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """Turn pydantic's errors into lines with field, value and remedy."""
    lines = []
    for detail in error.errors():
        place = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key{_suggestion(model, detail['loc'])}")
        elif detail["type"] == "missing":
            lines.append(f"{place}: missing; it has no default")
        elif detail["type"] == "value_error":  # of a validator of ours, which names its fields
            lines.append(f"{place}: {detail['ctx']['error']}".removeprefix(": "))
        else:
            lines.append(f"{place} = {detail.get('input')!r}: {detail['msg']}")
    return ConfigError(f"{source}: " + "; ".join(lines))


def _suggestion(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    fields: type[BaseModel] | None = model
    for part in location[:-1]:
        annotation = fields.model_fields[str(part)].annotation if fields else None
        fields = (
            annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel)
            else None
        )
    if fields is None:
        return ""
    close = difflib.get_close_matches(str(location[-1]), fields.model_fields, n=1)
    known = ", ".join(sorted(fields.model_fields))
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {known}"
