"""Micro-batches: items that arrive while a batch is being processed form the next batch.

Ray's ``serve.batch`` closes a batch after a fixed wait, even if no worker is free, so that many small batches queue up
under load. Here a batch is closed when its processing begins: an idle replica starts at once, and batches grow with
the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Gathers the items of callers in one event loop into batches.

    Args:
        work: processes a batch and returns its items' results in order; its error is raised to all of its callers.
        most: total size of a batch; a larger item forms a batch of its own.
        size: of an item.
        side_by_side: batches processed at the same time, so that one can be preprocessed while another is in the model.
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
            task = asyncio.create_task(self._work_until_empty())
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return await future

    async def _work_until_empty(self) -> None:
        while batch := self._next():
            try:
                results = await self._work([item for item, _ in batch])
            except Exception as error:  # any kind: it is passed to the callers
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # the caller may have been cancelled
                    future.set_result(result)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        size = 0
        while self._waiting:
            item, future = self._waiting[0]
            if future.done():  # the caller was cancelled while the item waited
                self._waiting.popleft()
                continue
            size += self._size(item)
            if batch and size > self._most:
                break
            batch.append(self._waiting.popleft())
        return batch
