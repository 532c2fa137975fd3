"""Configuration: defaults, then a preset, then YAML, then ``key=value``; the later wins.

Every level is a plain nested mapping until :class:`~notellm2_ray.core.settings.Settings` checks all of it at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from notellm2_ray.core.errors import ConfigError


class Frozen(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML or is not a mapping.
    """
    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"configuration file {path} must hold a mapping at its top, not a {type(value).__name__}")
    return value


def parse_override(text: str) -> tuple[list[str], Any]:
    """``"train.steps=10"`` as ``(["train", "steps"], 10)``; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r} is not of the form key=value, as in train.steps=10")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: its value is not valid YAML ({error})") from error


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """``update`` laid over ``base``, mapping by mapping; neither is changed."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def apply_overrides(base: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``key=value`` strings laid over a mapping."""
    merged = dict(base)
    for text in overrides:
        path, value = parse_override(text)
        for key in reversed(path):
            value = {key: value}
        merged = merge(merged, value)
    return merged


def build(model: type[Frozen], values: Mapping[str, Any]) -> Any:
    """``model`` from a nested mapping.

    Raises:
        ConfigError: one line per wrong key, with the nearest known key or the expected type.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, entry) for entry in error.errors())) from error


def _explain(model: type[BaseModel], entry: Mapping[str, Any]) -> str:
    loc = [str(part) for part in entry["loc"]]
    tag = _tag_of_union(model, loc[0]) if loc else None
    if tag is not None:
        del loc[1:2]  # a discriminated union puts its tag there (source.world.size); it is no key of the user's
    key = ".".join(loc)
    if entry["type"] == "extra_forbidden":
        return _explain_unknown(model, key, tag)
    given = entry.get("input")
    shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
    place = f"setting {key!r}" if key else "settings"
    return f"{place}: {entry['msg'].removeprefix('Value error, ')}{shown}"


def _explain_unknown(model: type[BaseModel], key: str, tag: str | None) -> str:
    known = _known_keys(model)
    if tag is not None and key in known:  # of another member of the union
        first = key.partition(".")[0]
        members = nested_models(model.model_fields[first].annotation)
        kinds = [one for one in members if key in _known_keys(one, f"{first}.")]
        named = " or ".join(f"{first}.{tag}={get_args(one.model_fields[tag].annotation)[0]}" for one in kinds)
        return f"setting {key!r} is of another {first}.{tag}: set {named}"
    last = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near = near[:3] or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `notellm2 settings` lists them all"
    return f"unknown setting {key!r}{hint}"


def _tag_of_union(model: type[BaseModel], name: str) -> str | None:
    """The key that tells the members of a discriminated union apart, where the field is one."""
    field = model.model_fields.get(name)
    return field.discriminator if field is not None and isinstance(field.discriminator, str) else None


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for nested in nested_models(field.annotation):
            keys += _known_keys(nested, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes inside an annotation, unions included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in nested_models(part)]


def to_plain(settings: BaseModel) -> dict[str, Any]:
    """Settings as JSON values: what is written beside every output and hashed into its fingerprint."""
    return json.loads(settings.model_dump_json())
