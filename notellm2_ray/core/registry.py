"""Tables whose rows are known by name at once and loaded only when they are asked for.

A row comes from one of three places: the table itself, the entry points of other installed packages, or a call of
:meth:`Registry.add` in this process.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from notellm2_ray.core.errors import ConfigError

Row = TypeVar("Row")


class Registry(Generic[Row]):
    """One table of rows by name.

    Attributes:
        what: what a row is, for messages, as in "source".
        group: entry-point group in which other packages declare rows, each as ``name = "module:attribute"``.
        rows: our own rows, name -> "module:attribute". Strings, so that naming a row imports nothing.
    """

    def __init__(self, what: str, group: str, rows: Mapping[str, str]) -> None:
        self.what, self.group, self.rows = what, group, rows
        self._added: dict[str, Row] = {}

    def add(self, name: str, row: Row) -> None:
        """Add a row in this process. Other processes do not see it: use an entry point where they must.

        Raises:
            ConfigError: another row has that name.
        """
        if name in self.names() and self._added.get(name) is not row:
            raise ConfigError(f"there is a {self.what} {name!r} already: choose another name")
        self._added[name] = row

    def remove(self, name: str) -> None:
        """Take back a row that was added in this process."""
        del self._added[name]

    def is_added(self, name: str) -> bool:
        """Whether the row was added by a call in this process, so that other processes cannot import it by name."""
        return name in self._added

    def names(self) -> list[str]:
        """The names of all rows: ours first, then those of other packages, then those added in this process."""
        return list(dict.fromkeys([*self.rows, *self._declared(), *self._added]))

    def check(self, setting: str, names: Iterable[str]) -> None:
        """Check the names that a setting gives, without loading their rows.

        Raises:
            ConfigError: one is unknown; the message names the setting, and the nearest name.
        """
        for name in names:
            if name not in self.names():
                raise ConfigError(f"setting {setting!r}: {self._unknown(name)}")

    def get(self, name: str) -> Row:
        """The row called ``name``.

        Raises:
            ConfigError: there is none (the message names the nearest), or its module cannot be loaded.
        """
        if name in self._added:
            return self._added[name]
        if name in self.rows:
            module, _, attribute = self.rows[name].partition(":")
            return getattr(import_module(module), attribute)
        declared = self._declared().get(name)
        if declared is None:
            raise ConfigError(self._unknown(name))
        try:
            return declared.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the {self.what} {name!r} is declared by an installed package as {declared.value}, which cannot be "
                f"loaded: {error}"
            ) from error

    def _declared(self) -> dict[str, EntryPoint]:
        return {one.name: one for one in entry_points(group=self.group)}

    def _unknown(self, name: str) -> str:
        known = self.names()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown {self.what} {name!r} (known: {', '.join(known)}){hint}"
