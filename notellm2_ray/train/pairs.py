"""The training pairs in memory, and one step's share of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NEGATIVES, PAIR_SCHEMA, require_columns
from notellm2_ray.models.embedder.losses import Negatives


class PairBatch(NamedTuple):
    """One rank's b pairs of a step, as notes: the queries, their targets in the same order, then hard negatives."""

    note_ids: list[str]  # (n,)
    note_keys: np.ndarray  # (n,) int64, equal for equal notes and the same on every rank; PADDING: not to be used
    negatives: Negatives | None = None  # None: n = 2b


class Pairs:
    """The pairs of one Parquet file, and their hard negatives.

    Attributes:
        note_ids: the distinct notes of the pairs and of their negatives.
        keys: (num_pairs, 2) int64, query and target as positions in ``note_ids``.
        negatives: all pairs' negatives as positions in ``note_ids``, those of pair i at ``offsets[i]:offsets[i + 1]``.
        offsets: (num_pairs + 1,) int64.
    """

    def __init__(self, path: Path, negatives: Path | None = None) -> None:
        """Read the pairs of ``path`` (PAIR_SCHEMA).

        Args:
            negatives: file that mine-negatives wrote for these pairs; None: the column ``negatives`` of ``path``, if it
                has one.

        Raises:
            DataError: a file is missing or lacks a column, or the negatives are of other pairs.
        """
        table = _read(path, "mine-pairs")
        listed = table if negatives is None else _read(negatives, "mine-negatives")
        if not listed.select(_IDS).equals(table.select(_IDS)):
            raise DataError(f"{negatives} does not list the pairs of {path}: run mine-negatives again")
        self.offsets = np.zeros(len(table) + 1, np.int64)
        chunks = table["query_id"].chunks + table["target_id"].chunks
        if NEGATIVES in listed.column_names:
            lists = listed[NEGATIVES].cast(pa.list_(pa.string()))
            np.cumsum(pc.fill_null(pc.list_value_length(lists), 0), out=self.offsets[1:])
            chunks = chunks + pc.list_flatten(lists).chunks
        encoded = pa.chunked_array(chunks, pa.string()).dictionary_encode().combine_chunks()
        self.note_ids: list[str] = encoded.dictionary.to_pylist()
        codes = np.asarray(encoded.indices)
        self.keys = codes[: 2 * len(table)].astype(np.int64).reshape(2, -1).T
        self.negatives = codes[2 * len(table) :]

    def __len__(self) -> int:
        return len(self.keys)

    def batch(self, rows: np.ndarray) -> PairBatch:
        """The pairs at ``rows``."""
        keys = self.keys[rows].T.reshape(-1)
        return PairBatch([self.note_ids[key] for key in keys], keys)


_IDS = ["query_id", "target_id"]


def _read(path: Path, verb: str) -> pa.Table:
    try:
        schema = pq.read_schema(path)
        require_columns(schema, PAIR_SCHEMA, str(path))
        return pq.read_table(path, columns=[*_IDS, *(name for name in (NEGATIVES,) if name in schema.names)])
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: run {verb} first") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}): run {verb} again") from error
