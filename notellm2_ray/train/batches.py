"""The notes of a step: read, decoded and tokenised ahead of the model, in groups of similar length."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.models.embedder.encoder import batches_by_length
from notellm2_ray.models.embedder.kinds import Preprocessor
from notellm2_ray.train import distributed
from notellm2_ray.train.readers import Readers

T = TypeVar("T")
K = TypeVar("K")

_NO_LIMIT = 2**62


class PreparedNotes(NamedTuple):
    """Some notes, ready for the model."""

    note_ids: list[str]  # (n,)
    groups: list[Any]  # collated batches that together hold the n notes, short notes first
    sizes: list[int]  # the groups' numbers of notes
    positions: torch.Tensor  # (n,) int64: each note's position in the concatenated groups

    def evened(self) -> PreparedNotes:
        """The same notes in as many groups as the rank with the most has; every rank must call it.

        The first group is repeated at the end, where no position points to. A forward pass of one rank may wait for
        those of the others, so that they must be equally many.
        """
        missing = max(distributed.gather_objects(len(self.groups))) - len(self.groups)
        return self._replace(
            groups=self.groups + self.groups[:1] * missing, sizes=self.sizes + self.sizes[:1] * missing
        )


class NotePreparer:
    """Turns note ids into the model's input. May be called from several threads at once."""

    def __init__(
        self,
        store: NoteStore,
        preprocessor: Preprocessor,
        num_groups: int,
        *,
        max_notes: int | None = None,
        max_tokens: int | None = None,
        readers: int = 0,
    ) -> None:
        """Prepare notes of ``store``.

        Args:
            num_groups: number of groups, if the following are None.
            max_notes: most notes in a group.
            max_tokens: most tokens in a group, with padding; a longer note is a group of its own.
            readers: see :class:`~notellm2_ray.train.readers.Readers`.
        """
        self._store, self._preprocessor, self._num_groups = store, preprocessor, num_groups
        self._max_notes, self._max_tokens = max_notes, max_tokens
        self.readers = Readers(preprocessor.features, readers)

    def __call__(self, note_ids: Sequence[str]) -> PreparedNotes:
        """Read and preprocess notes. The number of groups depends only on that of notes, unless tokens are limited.

        Raises:
            DataError: a note is not in the store, or its image cannot be decoded.
        """
        features = self.readers(self._store.get(note_ids))
        parts = self._parts([note.num_tokens for note in features])
        order = np.concatenate(parts)
        groups = [self._preprocessor.collate([features[row] for row in part]) for part in parts]
        positions = torch.empty(len(order), dtype=torch.long)
        positions[torch.from_numpy(order)] = torch.arange(len(order))
        return PreparedNotes(list(note_ids), groups, [len(part) for part in parts], positions)

    def _parts(self, lengths: list[int]) -> list[np.ndarray]:
        if self._max_notes is None and self._max_tokens is None:
            return np.array_split(np.argsort(lengths, kind="stable"), min(self._num_groups, len(lengths)))
        limits = self._max_tokens or _NO_LIMIT, self._max_notes or _NO_LIMIT
        return list(batches_by_length(lengths, *limits))[::-1]


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
