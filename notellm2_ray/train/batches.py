"""The notes of a step: read, decoded and tokenised ahead of the model, in groups of similar length."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.models.embedder.kinds import Preprocessor

T = TypeVar("T")
K = TypeVar("K")


class PreparedNotes(NamedTuple):
    """Some notes, ready for the model."""

    note_ids: list[str]  # (n,)
    groups: list[Any]  # collated batches that together hold the n notes, short notes first
    positions: torch.Tensor  # (n,) int64: each note's position in the concatenated groups

    def to(self, device: torch.device) -> PreparedNotes:
        """The same notes on ``device``."""
        groups = [batch.to(device, non_blocking=True) for batch in self.groups]
        return self._replace(groups=groups, positions=self.positions.to(device, non_blocking=True))


class NotePreparer:
    """Turns note ids into the model's input. May be called from several threads at once."""

    def __init__(self, store: NoteStore, preprocessor: Preprocessor, num_groups: int) -> None:
        self._store, self._preprocessor, self._num_groups = store, preprocessor, num_groups
        self._own = threading.local()

    def __call__(self, note_ids: Sequence[str]) -> PreparedNotes:
        """Read and preprocess notes. The number of groups depends only on the number of notes.

        Raises:
            DataError: a note is not in the store, or its image cannot be decoded.
        """
        preprocessor = self._thread_own()
        features = [preprocessor.features(note) for note in self._store.get(note_ids)]
        order = np.argsort([note.num_tokens for note in features], kind="stable")
        parts = np.array_split(order, min(self._num_groups, len(order)))
        groups = [preprocessor.collate([features[row] for row in part]) for part in parts]
        positions = torch.empty(len(order), dtype=torch.long)
        positions[torch.from_numpy(order)] = torch.arange(len(order))
        return PreparedNotes(list(note_ids), groups, positions)

    def _thread_own(self) -> Preprocessor:
        # Two threads cannot use one fast tokenizer at a time ("Already borrowed"), so each thread has a copy.
        if not hasattr(self._own, "preprocessor"):
            self._own.preprocessor = copy.deepcopy(self._preprocessor)
        return self._own.preprocessor


def prefetched(prepare: Callable[[K], T], keys: Iterable[K], depth: int) -> Iterator[T]:
    """Yields ``prepare(key)`` for every key, in order, and prepares up to ``depth`` more in threads meanwhile.

    An error of ``prepare`` is raised in place of its result. With ``depth`` 0 there are no threads.
    """
    if depth == 0:
        yield from map(prepare, keys)
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(depth, thread_name_prefix="prepare")
    try:
        for key in keys:
            waiting.append(pool.submit(prepare, key))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
