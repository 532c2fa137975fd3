"""The engine in its caller's process: refused and cancelled requests, and its failure.

Its answers are tested where they are used: scores against the model's own, preferences on a real engine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from notellm2_ray.infer import local_engine

pytestmark = pytest.mark.slow  # vLLM is imported for its exceptions


class Stand:
    """In LLMEngine's place: a request takes as many steps as its prompt says."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.aborted: list[str] = []
        self.go = threading.Event()
        self.broken = False
        self.go.set()

    def add_request(self, name: str, prompt: dict[str, Any], params: Any) -> None:
        if prompt["steps"] > 100:
            raise ValueError("longer than the maximum model length")
        self.left[name] = prompt["steps"]

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            self.left.pop(name, None)

    def step(self) -> list[Any]:
        self.go.wait(10)
        if self.broken:
            raise RuntimeError("out of cache")
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        done = [name for name, steps in self.left.items() if steps == 0]
        for name in done:
            del self.left[name]
        ended = [SimpleNamespace(request_id=name, finished=True) for name in done]
        return [*ended, *(SimpleNamespace(request_id=name, finished=False) for name in self.left)]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    stand = Stand()
    stand.engine_core = SimpleNamespace(shutdown=lambda: None)
    monkeypatch.setattr(local_engine, "_load", lambda arguments, threads: stand)
    yield stand
    stand.go.set()


async def answers(engine: local_engine.LocalEngine, name: str, steps: int) -> list[str]:
    return [output.request_id async for output in engine.generate({"steps": steps}, None, name)]


def test_a_refused_request_fails_alone(stand: Stand) -> None:
    async def ask() -> list[Any]:
        engine = local_engine.LocalEngine({}, 1)
        asked = [answers(engine, f"r{steps}", steps) for steps in (3, 101, 1, 7)]
        made = await asyncio.gather(*asked, return_exceptions=True)
        return [*made, await answers(engine, "later", 2)]

    first, refused, *others = asyncio.run(ask())
    assert first == ["r3"] and others == [["r1"], ["r7"], ["later"]]
    assert isinstance(refused, ValueError) and "maximum model length" in str(refused)


def test_requests_that_were_cancelled_are_aborted(stand: Stand) -> None:
    async def ask() -> list[str]:
        engine = local_engine.LocalEngine({}, 1)
        stand.go.clear()
        slow = asyncio.create_task(answers(engine, "slow", 50))
        quick = asyncio.create_task(answers(engine, "quick", 2))
        while "slow" not in stand.left:
            await asyncio.sleep(0.001)
        slow.cancel()
        unborn = asyncio.create_task(answers(engine, "unborn", 2))  # cancelled before the engine has received it
        await asyncio.sleep(0)
        unborn.cancel()
        await asyncio.gather(slow, unborn, return_exceptions=True)
        stand.go.set()
        return await quick

    assert asyncio.run(ask()) == ["quick"]
    assert stand.aborted == ["slow"] and not stand.left


def test_a_step_that_fails_ends_all_requests(stand: Stand) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    async def ask() -> list[Any]:
        engine = local_engine.LocalEngine({}, 1)
        await engine.check_health()
        stand.go.clear()
        under_way = asyncio.create_task(answers(engine, "under way", 5))
        while not stand.left:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(answers(engine, "waiting", 5))
        await asyncio.sleep(0)
        stand.broken = True
        stand.go.set()
        ended = await asyncio.gather(under_way, waiting, return_exceptions=True)
        later = await asyncio.gather(answers(engine, "later", 1), engine.check_health(), return_exceptions=True)
        return [*ended, *later]

    ended = asyncio.run(ask())
    assert all(isinstance(error, EngineDeadError) for error in ended)
    assert {str(error.__cause__) for error in ended} == {"out of cache"}
