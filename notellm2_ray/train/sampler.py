"""Which pairs and which hard negatives are in which step.

It depends only on the seed and the step, so that resuming needs no state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.models.embedder.losses import PADDING, Negatives
from notellm2_ray.train.hard_negatives import HardNegatives
from notellm2_ray.train.pairs import PairBatch, Pairs


class StepSampler:
    """Assigns rows to steps and ranks.

    Every epoch has its own random order, drawn from (seed, epoch). A step takes the next ``batch`` rows, and each rank
    an equal slice of them, so that the rows of a step do not depend on the number of ranks. Rows at the end of an epoch
    that do not fill a batch are left out of that epoch.
    """

    def __init__(self, num_rows: int, batch: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._num_rows, self._batch, self.seed = num_rows, batch, seed
        self._share = batch // world_size
        self._first = rank * self._share
        self.steps_per_epoch = num_rows // batch

    def rows(self, step: int) -> np.ndarray:
        """This rank's rows in ``step`` (counted from 0)."""
        return self.all_rows(step)[self._first : self._first + self._share]

    def all_rows(self, step: int) -> np.ndarray:
        """The rows of all ranks in ``step``, in rank order."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return _order(self.seed, epoch, self._num_rows)[batch * self._batch : (batch + 1) * self._batch]


class PairSampler(StepSampler):
    """Assigns pairs, and k hard negatives of each, to steps and ranks."""

    def __init__(
        self, pairs: Pairs, batch_pairs: int, seed: int, rank: int = 0, world_size: int = 1, hard_negatives: int = 0
    ) -> None:
        """A sampler for one rank.

        Args:
            hard_negatives: k. They are drawn anew in every step. A pair with fewer is filled up with notes that no row
                sees, so that every rank has equally many notes.

        Raises:
            DataError: there are fewer pairs than fill a batch, or negatives are wanted and no pair has any.
        """
        super().__init__(len(pairs), batch_pairs, seed, rank, world_size)
        self.pairs = pairs
        self._draws = HardNegatives(pairs, hard_negatives, seed) if hard_negatives else None
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(pairs)} training pairs do not fill one batch of train.batch_pairs={batch_pairs}: "
                "lower train.batch_pairs, or mine more pairs (see pairs.* and split.*)"
            )

    def __getitem__(self, step: int) -> PairBatch:
        batch = self.pairs.batch(self.rows(step))
        if self._draws is None:
            return batch
        rows = self.all_rows(step)
        drawn = self._draws.draw(step, rows).reshape(len(rows) // self._share, -1)  # (ranks, b * k)
        own = drawn[self._first // self._share]
        queries = np.repeat(batch.note_keys[: self._share], len(own) // self._share)
        ids = [self.pairs.note_ids[key] for key in np.where(own == PADDING, queries, own)]
        related = self._draws.related(batch.note_keys, drawn)
        return PairBatch([*batch.note_ids, *ids], np.concatenate([batch.note_keys, own]), Negatives(len(own), related))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng(stream_seed(seed, "train", "order", epoch)).permutation(num_rows)
