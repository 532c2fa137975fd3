"""What the API reference makes of docstrings and comments. An extension of griffe, which reads the source.

Sphinx roles such as :class:`~a.b.C` become links. A class's fields become a list with their types and comments; other
variables without a docstring are left out.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`([^`]+)`")
COMMENT = re.compile(r"  # (?!fmt:|type:|noqa)(.+)$")
PACKAGE = "notellm2_ray."


class Texts(griffe.Extension):
    """Works on every object as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)

    def on_module_members(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        _take_variables(mod)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        fields = _take_variables(cls)
        if fields and cls.docstring is not None and "Attributes:" not in cls.docstring.value:
            listing = "\n".join(f"    {one.name} ({one.annotation}): {_comment(one)}" for one in fields)
            cls.docstring.value += f"\n\nAttributes:\n{listing}\n"


def _take_variables(owner: griffe.Module | griffe.Class) -> list[griffe.Attribute]:
    """Take the variables without a docstring away; those of them that are public and annotated."""
    taken = []
    for name, member in list(owner.members.items()):
        if isinstance(member, griffe.Attribute) and member.docstring is None and "property" not in member.labels:
            del owner.members[name]
            if member.annotation is not None and not name.startswith("_"):
                taken.append(member)
    return taken


def _link(role: re.Match[str]) -> str:
    target = role[1].lstrip("~.")
    shown = target.rpartition(".")[2] if role[1].startswith("~") else target
    if not target.startswith(PACKAGE):
        return f"`{shown}`"
    # Optional: what is private has no entry to link to.
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def _comment(field: griffe.Attribute) -> str:
    """The comment at the end of the field's line, or nothing."""
    if field.lineno is None:
        return ""
    found = COMMENT.search(field.lines_collection[field.filepath][(field.endlineno or field.lineno) - 1])
    return found[1] if found else ""
