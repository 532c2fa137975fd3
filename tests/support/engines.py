"""Stand-ins for vLLM engines that can be slow or fail on demand, as real ones rarely do."""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class Step(NamedTuple):
    preference: str


class Preferences:
    async def advance(self, previous, items, *, user, block):
        await asyncio.sleep(0.01)
        return Step(f"{previous or user}|{','.join(item.title for item in items)}")


class Ranker:
    """P(yes) grows with the number in a title; a preference 'slow' or 'broken' makes it slow or fail."""

    async def score(self, preference, history_titles, candidates):
        if preference and "slow" in preference:
            await asyncio.sleep(5)
        if preference and "broken" in preference:
            raise RuntimeError("engine gone")
        return [int(title.split()[-1]) / 1000 for title, _ in candidates]


def make_preferences():
    return Preferences()


def make_ranker():
    return Ranker()
