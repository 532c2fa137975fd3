"""Micro-batches: which items form a batch, and which callers get which result."""

from __future__ import annotations

import asyncio

import pytest

from notellm2_ray.serve.deployments.micro_batch import MicroBatcher


class Work:
    """Doubles numbers once it is released; records its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.let = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.let.wait()
        if -1 in items:
            raise ValueError("a bad one")
        return [2 * item for item in items]


def submit_all(batcher, items):
    return [asyncio.ensure_future(batcher.submit(item)) for item in items]


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_items_that_arrive_during_a_batch_form_the_next_one():
    async def run():
        work = Work()
        batcher = MicroBatcher(work, most=4, side_by_side=2)
        first = submit_all(batcher, [0, 1])
        await settle()
        assert work.batches == [[0, 1]]  # immediately: nothing else was in progress
        rest = submit_all(batcher, range(2, 12))
        await settle()
        assert work.batches[1:] == [[2, 3, 4, 5]]  # the second batch in progress; the others wait
        work.let.set()
        assert await asyncio.gather(*first, *rest) == [2 * item for item in range(12)]
        assert work.batches[2:] == [[6, 7, 8, 9], [10, 11]]

    asyncio.run(run())


def test_a_failure_reaches_only_the_callers_of_its_batch():
    async def run():
        work = Work()
        batcher = MicroBatcher(work, most=2, side_by_side=1)
        work.let.set()
        done = await asyncio.gather(*submit_all(batcher, [1, -1, 2, 3]), return_exceptions=True)
        assert [type(one) for one in done] == [ValueError, ValueError, int, int]
        assert await batcher.submit(7) == 14  # later batches work

    asyncio.run(run())


def test_items_of_cancelled_callers_are_not_processed():
    async def run():
        work = Work()
        batcher = MicroBatcher(work, most=1, side_by_side=1)
        first, gone, last = submit_all(batcher, [1, 2, 3])
        await settle()
        gone.cancel()
        work.let.set()
        assert [await first, await last] == [2, 6]
        assert work.batches == [[1], [3]]
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(run())


def test_an_item_larger_than_a_batch_forms_its_own():
    async def run():
        work = Work()
        work.let.set()
        batcher = MicroBatcher(work, most=3, size=lambda item: item, side_by_side=1)
        assert await asyncio.gather(*submit_all(batcher, [2, 5, 1, 2, 1])) == [4, 10, 2, 4, 2]
        assert work.batches == [[2], [5], [1, 2], [1]]

    asyncio.run(run())
