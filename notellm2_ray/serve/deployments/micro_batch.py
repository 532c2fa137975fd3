"""Micro-batches: what comes while others are worked on goes together next.

Ray's ``serve.batch`` closes a batch when its wait is over, whether or not anybody is free to work on it: under load it
queues many small batches. Here a batch is closed when
its work begins. An idle replica starts at once, and the busier it is the larger the batches are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Gathers what callers submit; of one event loop.

    Args:
        work: the results of a batch's items, in their order; what it raises is raised to all callers of the batch.
        most: items' size in a batch; a larger item goes alone.
        size: of an item.
        side_by_side: batches in work at once, so that one can be prepared while another is in the model.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        most: int,
        size: Callable[[Item], int] = lambda item: 1,
        side_by_side: int = 2,
    ) -> None:
        self._work, self._most, self._size, self._side_by_side = work, most, size, side_by_side
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._working: set[asyncio.Task[None]] = set()  # the loop itself keeps no strong reference

    async def submit(self, item: Item) -> Result:
        """The item's result."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._working) < self._side_by_side:
            task = asyncio.create_task(self._until_none_waits())
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return await future

    async def _until_none_waits(self) -> None:
        while batch := self._next():
            try:
                results = await self._work([item for item, _ in batch])
            except Exception as error:  # of any kind: the callers wait for it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # its caller may have given up
                    future.set_result(result)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        size = 0
        while self._waiting:
            item, future = self._waiting[0]
            if future.done():  # given up while it waited
                self._waiting.popleft()
                continue
            size += self._size(item)
            if batch and size > self._most:
                break
            batch.append(self._waiting.popleft())
        return batch
