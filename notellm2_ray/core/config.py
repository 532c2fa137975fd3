"""Configuration: defaults, then a preset, then YAML, then ``key=value``, where the later overrides the earlier.

Every level is a plain nested mapping, until :class:`~notellm2_ray.core.settings.Settings` checks everything at once.
"""

from __future__ import annotations

import difflib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from notellm2_ray.core.errors import ConfigError


class Frozen(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Kinds(Frozen):
    """Base of settings whose class depends on their ``kind``. The class that defines :meth:`kinds` takes all."""

    kind: str

    @classmethod
    @abstractmethod
    def kinds(cls) -> Mapping[str, type[Kinds]]:
        """The settings class of each kind."""


def resource(default: Any, **field: Any) -> Any:
    """A ``Field`` for a knob that decides where, how fast or how carefully a stage runs, and not what it makes.

    Changing such a knob redoes nothing: :func:`shaping` leaves it out of what an output is made of.
    """
    return Field(default, json_schema_extra={"shapes_output": False}, **field)


def added(default: Any, **field: Any) -> Any:
    """A ``Field`` for a knob that came later and whose default changes nothing.

    At its default :func:`shaping` leaves it out, so that outputs from before it stay valid.
    """
    return Field(default, json_schema_extra={"shapes_output": "unless default"}, **field)


def shaping(settings: BaseModel) -> dict[str, Any]:
    """A section's settings that shape what is made, as JSON values."""
    plain = to_plain(settings)
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        shapes = extra.get("shapes_output", True) if isinstance(extra, dict) else True
        value = getattr(settings, name)
        if shapes is False or (shapes == "unless default" and value == field.get_default()):
            del plain[name]
        elif isinstance(value, BaseModel):
            plain[name] = shaping(value)
    return plain


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
    """A new mapping: ``base`` overridden by ``update``, level by level."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def apply_overrides(base: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A new mapping: ``base`` overridden by ``key=value`` strings."""
    merged = dict(base)
    for text in overrides:
        path, value = parse_override(text)
        for key in reversed(path):
            value = {key: value}
        merged = merge(merged, value)
    return merged


def build(model: type[Frozen], values: Mapping[str, Any]) -> Any:
    """Settings of class ``model`` from a nested mapping.

    Raises:
        ConfigError: one line for each wrong key, with the nearest known key or the expected type.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, entry, values) for entry in error.errors())) from error


def _explain(model: type[BaseModel], entry: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return _explain_unknown(model, key, values)
    given = entry.get("input")
    shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
    place = f"setting {key!r}" if key else "settings"
    return f"{place}: {entry['msg'].removeprefix('Value error, ')}{shown}"


# Old names of settings -> new names.
RENAMED = {
    "ranker.prompt_language": "prompts.language",
    "evaluate.variants": "evaluate.embedders",
    "sequences.actions": "sequences.positive_actions",
    "serve.encode.precision": "embed.precision",
    "embed.block_rows": "embed.chunk_rows",
}


def _explain_unknown(model: type[BaseModel], key: str, values: Mapping[str, Any]) -> str:
    if key in RENAMED:
        return f"setting {key!r} is now called {RENAMED[key]!r}"
    known = _known_keys(model)
    if key in known:  # but not in the settings of the chosen kind
        section = key.partition(".")[0]
        owners = [kind for kind, one in _kinds_of(model, section).items() if key in _known_keys(one, f"{section}.")]
        named = " or ".join(f"{section}.kind={kind}" for kind in owners)
        return f"setting {key!r} is of another {section}.kind: set {named}"
    known = _known_keys(_chosen_kind(model, key, values), f"{key.partition('.')[0]}.") or known
    last = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near = near[:3] or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `notellm2 settings` lists them all"
    return f"unknown setting {key!r}{hint}"


def _chosen_kind(model: type[BaseModel], key: str, values: Mapping[str, Any]) -> type[BaseModel]:
    """The settings class of the kind that a key's section is given, where it has kinds; else one without any keys."""
    section = key.partition(".")[0]
    kinds = _kinds_of(model, section) if section in model.model_fields else {}
    given = values.get(section)
    return kinds.get(str(given.get("kind")), BaseModel) if isinstance(given, Mapping) else BaseModel


def _kinds_of(model: type[BaseModel], section: str) -> Mapping[str, type[BaseModel]]:
    base: Any = model.model_fields[section].annotation
    return base.kinds() if _stands_for_kinds(base) else {}


def _stands_for_kinds(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Kinds) and "kinds" in vars(annotation)


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for nested in nested_models(field.annotation):
            keys += _known_keys(nested, f"{prefix}{below(name, field.annotation)}")
    return list(dict.fromkeys(keys))


def below(name: str, annotation: Any) -> str:
    """How the keys inside a field begin: ``name.``, or ``name.NAME.`` where the user names each entry."""
    return f"{name}.NAME." if get_origin(annotation) is dict else f"{name}."


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    """All settings classes inside an annotation, also those of a union and of settings of several kinds."""
    if _stands_for_kinds(annotation):
        return list(annotation.kinds().values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in nested_models(part)]


def to_plain(settings: BaseModel) -> dict[str, Any]:
    """Settings as JSON values, as they are written beside every output and hashed into its fingerprint."""
    return json.loads(settings.model_dump_json())
