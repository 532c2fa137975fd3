"""Which pairs are in which step: it depends only on the seed and the step, so that resuming needs no state."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import PAIR_SCHEMA, require_columns


class PairBatch(NamedTuple):
    """One rank's b pairs of a step, as 2b notes: the queries, then their targets in the same order."""

    note_ids: list[str]  # (2b,)
    note_keys: np.ndarray  # (2b,) int64, equal for equal notes and the same on every rank


class Pairs:
    """The pairs of one Parquet file.

    Attributes:
        note_ids: the distinct notes of the pairs.
        keys: (num_pairs, 2) int64, query and target as positions in ``note_ids``.
    """

    def __init__(self, path: Path) -> None:
        """Read the pairs of ``path`` (PAIR_SCHEMA).

        Raises:
            DataError: the file is missing or lacks a column.
        """
        try:
            schema = pq.read_schema(path)
            require_columns(schema, PAIR_SCHEMA, str(path))
            table = pq.read_table(path, columns=["query_id", "target_id"])
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: run mine-pairs first") from None
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is damaged ({error}): run mine-pairs again") from error
        both = pa.chunked_array(table["query_id"].chunks + table["target_id"].chunks, pa.string())
        encoded = both.dictionary_encode().combine_chunks()
        self.note_ids: list[str] = encoded.dictionary.to_pylist()
        self.keys = np.asarray(encoded.indices, dtype=np.int64).reshape(2, -1).T

    def __len__(self) -> int:
        return len(self.keys)

    def batch(self, rows: np.ndarray) -> PairBatch:
        """The pairs at ``rows``."""
        keys = self.keys[rows].T.reshape(-1)
        return PairBatch([self.note_ids[key] for key in keys], keys)


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
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self._batch + self._first
        return _order(self.seed, epoch, self._num_rows)[begin : begin + self._share]


class PairSampler(StepSampler):
    """Assigns pairs to steps and ranks."""

    def __init__(self, pairs: Pairs, batch_pairs: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """A sampler for one rank.

        Raises:
            DataError: there are fewer pairs than fill a batch.
        """
        super().__init__(len(pairs), batch_pairs, seed, rank, world_size)
        self.pairs = pairs
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(pairs)} training pairs do not fill one batch of train.batch_pairs={batch_pairs}: "
                "lower train.batch_pairs, or mine more pairs (see pairs.* and split.*)"
            )

    def __getitem__(self, step: int) -> PairBatch:
        return self.pairs.batch(self.rows(step))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng(stream_seed(seed, "train", "order", epoch)).permutation(num_rows)
