"""Which hard negatives a step compares its notes with, and which of them are related to some of its notes."""

from __future__ import annotations

import numpy as np
import torch

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.models.embedder.losses import PADDING
from notellm2_ray.train.pairs import Pairs


class HardNegatives:
    """Draws k negatives of each pair of a step from the pair's list.

    Args:
        pairs: with their negatives.
        count: k.
        seed: of the draws. They depend on it and on the step, and not on the number of ranks.

    Raises:
        DataError: no pair has a negative.
    """

    def __init__(self, pairs: Pairs, count: int, seed: int) -> None:
        from scipy.sparse import coo_matrix

        if not len(pairs.negatives):
            raise DataError(
                f"train.hard_negatives={count} needs negatives, and no training pair has any: run mine-negatives for a "
                "trained embedder and name it in train.negatives_of, or give the pairs a column `negatives`"
            )
        self._pairs, self._count, self._seed = pairs, count, seed
        query, target = pairs.keys.T
        ones, num_notes = np.ones(2 * len(query), bool), len(pairs.note_ids)
        ends = np.concatenate([query, target]), np.concatenate([target, query])
        self._known = coo_matrix((ones, ends), (num_notes, num_notes)).tocsr()

    def draw(self, step: int, rows: np.ndarray) -> np.ndarray:
        """(B, k) int64: keys of notes, none of a pair's twice; PADDING where a pair has fewer than k.

        Args:
            rows: (B,) the pairs of all ranks.
        """
        starts, lengths = self._pairs.offsets[rows], np.diff(self._pairs.offsets)[rows]
        rng = np.random.default_rng(stream_seed(self._seed, "train", "negatives", step))
        order = rng.random((len(rows), max(self._count, int(lengths.max()))))
        order[np.arange(order.shape[1]) >= lengths[:, None]] = 2.0  # behind all that are there
        chosen = np.argsort(order, axis=1)[:, : self._count]
        there = chosen < lengths[:, None]
        places = np.where(there, starts[:, None] + chosen, 0)
        return np.where(there, self._pairs.negatives[places], PADDING).astype(np.int64)

    def related(self, note_keys: np.ndarray, drawn: np.ndarray) -> torch.Tensor:
        """(K, 2) int64: a row, and a column with a hard negative that is related to the row's note by a training pair.

        Args:
            note_keys: (2b,) keys of this rank's queries and targets, the rows.
            drawn: (ranks, m) keys of the hard negatives of all ranks. A rank's columns are its 2b notes, then these m.
        """
        from scipy.sparse import coo_matrix

        rank, place = np.nonzero(drawn != PADDING)
        columns = rank * (len(note_keys) + drawn.shape[1]) + len(note_keys) + place
        shape = self._known.shape[1], drawn.shape[0] * (len(note_keys) + drawn.shape[1])
        holds = coo_matrix((np.ones(len(columns), bool), (drawn[rank, place], columns)), shape).tocsr()
        found = (self._known[note_keys] @ holds).nonzero()
        return torch.from_numpy(np.stack(found, axis=1).astype(np.int64))
