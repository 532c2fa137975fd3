"""How much a replica has to do: items in hand, and the seconds that they will take by what such items took lately."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from notellm2_ray.serve.errors import OverloadedError

_WEIGHT = 0.2  # of the newest measurement: a first batch, which warms up, is forgotten after some ten


class Workload:
    """Refuses what would wait too long.

    Requests are no measure of that: one may hold a single text or 64 notes with images.

    Args:
        most_seconds: of work in hand, beyond which more is refused.
    """

    def __init__(self, most_seconds: float) -> None:
        self.most_seconds, self.items = most_seconds, 0
        self._seconds: dict[str, float] = {}  # of an item, by stage

    @property
    def item_seconds(self) -> float:
        """Time that an item takes: the slowest stage's, since the stages work side by side."""
        return max(self._seconds.values(), default=0.0)

    def took(self, stage: str, seconds: float, items: int) -> None:
        """Measure a stage."""
        if items:
            one = seconds / items
            before = self._seconds.get(stage, one)
            self._seconds[stage] = before + _WEIGHT * (one - before)

    @contextmanager
    def room_for(self, items: int) -> Iterator[None]:
        """Count items in; what comes when nothing is in hand always has room.

        Raises:
            OverloadedError: all in hand would take too long.
        """
        seconds = (self.items + items) * self.item_seconds
        if self.items and seconds > self.most_seconds:
            raise OverloadedError(f"there are some {seconds:.0f} s of work in hand: try again soon")
        self.items += items
        try:
            yield
        finally:
            self.items -= items
