"""Stand-ins for vLLM engines that can be slow or fail on demand, as real ones rarely do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import NamedTuple

CORE = "engine core"  # in the command line of the process of an engine
# Fills its memory at SIGUSR1, and ends with the process that started it.
_CORE = f"""# {CORE}
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
def fill(*_):
    kept = []
    while True:
        kept.append(bytearray(2**24))
signal.signal(signal.SIGUSR1, fill)
sys.stdin.read()
"""


class Core:
    """The process in which vLLM's engine computes: without it the engine is dead."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", _CORE], stdin=subprocess.PIPE)

    async def check_health(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError("EngineCore encountered an issue")


class Step(NamedTuple):
    preference: str


class Preferences:
    async def advance(self, previous, items, *, user, block):
        await asyncio.sleep(0.01)
        return Step(f"{previous or user}|{','.join(item.title for item in items)}")


class Ranker:
    """P(yes) grows with the number in a title; a preference 'slow' or 'broken' makes it slow or fail."""

    def __init__(self) -> None:
        self.engine = Core()

    async def score(self, preference, history_titles, candidates):
        await self.engine.check_health()
        if preference and "slow" in preference:
            await asyncio.sleep(5)
        if preference and "broken" in preference:
            raise RuntimeError("engine gone")
        return [int(title.split()[-1]) / 1000 for title, _ in candidates]


def make_preferences():
    return Preferences()


def make_ranker():
    return Ranker()
