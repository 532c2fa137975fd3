"""What several baselines, or several calls of one, share and make once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """Base of the data that baselines are given."""

    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, kw_only=True)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned the first time for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
