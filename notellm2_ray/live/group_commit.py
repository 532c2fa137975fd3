"""Group commits: writes of concurrent callers are committed together; each caller is answered when they are durable."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from notellm2_ray.core.errors import OutputError

log = logging.getLogger(__name__)
T = TypeVar("T")


class GroupCommitter(Generic[T]):
    """One thread that commits what callers submit, in order of arrival, one group at a time.

    The next group gathers while one is being committed, so that groups and throughput grow with the load.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[list[T]], Sequence[Any]],
        *,
        size: Callable[[T], int] = lambda item: 1,
        gather_seconds: float = 0.003,
        max_size: int = 4096,
        upkeep: Callable[[bool], None] | None = None,
        idle_seconds: float = 1.0,
    ):
        """Start the thread.

        Args:
            name: of the thread, and in errors.
            commit: makes a group durable and returns one result per item; a result that is an exception is raised to
                that item's caller only. If ``commit`` raises, every caller of the group gets that error.
            size: of an item, as its number of rows.
            gather_seconds: how long the first item of a group waits for others.
            max_size: a group is closed at this size.
            upkeep: called in the thread with False after every group, when its callers have been answered, and with
                True when nothing was submitted for ``idle_seconds``.
        """
        self._commit, self._size, self._upkeep, self._idle_seconds = commit, size, upkeep, idle_seconds
        self._gather_seconds, self._max_size, self._name = gather_seconds, max_size, name
        self._queue: queue.SimpleQueue[tuple[T, Future] | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()  # so that nothing is queued behind the end mark
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: T) -> Future:
        """A future of the item's result; ``asyncio.wrap_future`` makes it awaitable.

        Raises:
            OutputError: the committer is closed or its thread has ended.
        """
        future: Future = Future()
        future.set_running_or_notify_cancel()  # it is written even if the caller stops waiting
        with self._closing:
            if self._closed:
                raise OutputError(f"{self._name} is closed: nothing can be written any more")
            self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Write what was submitted, then stop."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; false after :meth:`close`."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._commit_groups()
        finally:
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Fail what is still queued; there is nothing unless the thread ended by a bug."""
        with self._closing:
            self._closed = True
            while not self._queue.empty():
                entry = self._queue.get()
                if entry is not None:
                    entry[1].set_exception(OutputError(f"{self._name} has ended: this was not written"))

    def _commit_groups(self) -> None:
        while True:
            group, ended = self._next_group()
            if group:
                self._write(group)
            if ended:
                return
            if self._upkeep is not None:
                try:
                    self._upkeep(not group)
                # BaseException, because a panic inside Lance is one (pyo3's PanicException). If the thread ended here,
                # nothing could be written any more.
                except BaseException:
                    log.exception("%s: upkeep failed and will be tried again", self._name)

    def _next_group(self) -> tuple[list[tuple[T, Future]], bool]:
        """The next group (empty if nothing was submitted for ``idle_seconds``), and whether it is the last."""
        try:
            first = self._queue.get(timeout=self._idle_seconds if self._upkeep is not None else None)
        except queue.Empty:
            return [], False
        if first is None:
            return [], True
        group, size = [first], self._size(first[0])
        until = time.monotonic() + self._gather_seconds
        while size < self._max_size:
            try:
                entry = self._queue.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if entry is None:
                return group, True
            group.append(entry)
            size += self._size(entry[0])
        return group, False

    def _write(self, group: list[tuple[T, Future]]) -> None:
        try:
            results = self._commit([item for item, _ in group])
        except BaseException as error:  # also a panic inside Lance, see _commit_groups
            # Callers await the future, and a BaseException would end an asyncio task.
            failure = error if isinstance(error, Exception) else OutputError(f"{self._name} failed: {error}")
            for _, future in group:
                future.set_exception(failure)
            return
        for (_, future), result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
