"""A replica's workload: the items in hand and the seconds they will take, estimated from recent ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from notellm2_ray.serve.errors import OverloadedError

_WEIGHT = 0.2  # of the newest measurement; a slow first batch is forgotten after about ten others


class Workload:
    """Refuses items that would have to wait too long.

    The number of requests says little about that: a request may hold one text, or 64 notes with images.

    Args:
        most_seconds: of work in hand; beyond it further items are refused.
    """

    def __init__(self, most_seconds: float) -> None:
        self.most_seconds, self.items = most_seconds, 0
        self._seconds: dict[str, float] = {}  # per item, by stage

    @property
    def item_seconds(self) -> float:
        """Seconds per item: those of the slowest stage, because the stages run in parallel."""
        return max(self._seconds.values(), default=0.0)

    def took(self, stage: str, seconds: float, items: int) -> None:
        """Record how long a stage took for some items."""
        if items:
            one = seconds / items
            before = self._seconds.get(stage, one)
            self._seconds[stage] = before + _WEIGHT * (one - before)

    @contextmanager
    def room_for(self, items: int) -> Iterator[None]:
        """Count items as in hand. If there are no others, they are always accepted.

        Raises:
            OverloadedError: all items in hand would take too long.
        """
        seconds = (self.items + items) * self.item_seconds
        if self.items and seconds > self.most_seconds:
            raise OverloadedError(f"about {seconds:.0f} s of work are in hand already: try again soon")
        self.items += items
        try:
            yield
        finally:
            self.items -= items
