"""Pages of the documentation that follow from the code: all settings, and the API reference. A hook of mkdocs.

The reference is read from the source without importing it (griffe); the settings are imported, and need pydantic alone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "notellm2_ray"
LOOSE = ("cli", "presets", "environment")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the reference's pages in the navigation."""
    pages: list[Any] = [{"notellm2_ray": "reference/overview.md"}]
    pages += [{room: f"reference/notellm2_ray.{room}.md"} for room in rooms()]
    for section in config.nav or []:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else ():
                if "API reference" in entry:
                    entry["API reference"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"settings.md": settings_page(), "reference/overview.md": front_page()}
    pages |= {f"reference/notellm2_ray.{room}.md": room_page(room) for room in rooms()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def rooms() -> list[str]:
    """The packages of ``notellm2_ray``, in the order of the alphabet."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def front_page() -> str:
    """What users import, and the modules outside of any room."""
    loose = "\n\n".join(f"::: notellm2_ray.{name}" for name in LOOSE)
    listing = "\n".join(f"- [`{room}`](notellm2_ray.{room}.md)" for room in rooms())
    return (
        "# API reference\n\n`from notellm2_ray import Note, NoteEncoder` is all that a user of an embedder needs: "
        "[NoteEncoder][notellm2_ray.models.embedder.encoder.NoteEncoder] turns each "
        "[Note][notellm2_ray.core.schema.Note] into a vector. [Design](../design.md) says what each room is for.\n\n"
        f"{listing}\n\nThree modules stand outside of any room:\n\n{loose}\n"
    )


def room_page(room: str) -> str:
    """All modules of a room."""
    modules = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1:3] != ("core", "settings"):  # they have a page of their own
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    first, *others = modules
    head = (
        f"# notellm2_ray.{room}\n\n::: {first}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n"
    )
    return head + "".join(f"\n::: {module}\n    options: {{heading_level: 2}}\n" for module in others)


def settings_page() -> str:
    """Every setting with its default and what it does."""
    sys.path.insert(0, str(ROOT))
    from notellm2_ray.core.config import nested_models
    from notellm2_ray.core.settings import Settings

    lines = [
        "# Settings\n",
        "Every setting, with its default and what it does. Give it as `key=value` on the command line, or nest it in a "
        "YAML file: see [Steps](steps.md#settings). `null` means that there is none. Where the text ends in \\*, the "
        "setting only says where, how fast or how carefully a step runs: changing it redoes nothing.\n",
        "## At the top\n",
        *_HEAD,
    ]
    top = [name for name, field in Settings.model_fields.items() if not nested_models(field.annotation)]
    lines += [_row(name, Settings.model_fields[name].default, Settings.model_fields[name].description) for name in top]
    for name, field in Settings.model_fields.items():
        models = nested_models(field.annotation)
        prefix = f"{name}.NAME." if get_origin(field.annotation) is dict else f"{name}."
        if models:
            lines.append(f"\n## {name}\n")
        for model in models:
            if len(models) > 1:
                kind = model.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
                lines.append(f"\n### {name}.kind={kind}\n")
            lines += [f"{(model.__doc__ or '').strip().splitlines()[0]}\n", *_HEAD, *_rows(model, prefix, None)]
    return "\n".join(lines) + "\n"


_HEAD = ("| setting | default | what it does |", "|---|---|---|")


def _rows(model: type[BaseModel], prefix: str, own: BaseModel | None) -> list[str]:
    from notellm2_ray.core.config import nested_models

    rows = []
    for name, field in model.model_fields.items():
        if name == "kind":  # the heading says it
            continue
        nested = nested_models(field.annotation)
        value = field.default if own is None else getattr(own, name)
        if not nested:
            free = isinstance(field.json_schema_extra, dict) and not field.json_schema_extra.get("shapes_output", True)
            text = f"{field.description or ''}{' *' if free else ''}"
            rows.append(_row(f"{prefix}{name}", "required" if field.is_required() else value, text))
            continue
        if value is None or value == ():
            rows.append(_row(f"{prefix}{name}", value, field.description))
        for inner in nested:
            default = value if isinstance(value, inner) else None
            rows += _rows(inner, f"{prefix}{name}.", default)
    return rows


def _row(key: str, value: Any, text: str | None) -> str:
    shown = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000).replace("\n...", "").strip()
    words = re.sub(r"([|*])", r"\\\1", text or "")
    return f"| `{key}` | `{shown}` | {words} |"


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
