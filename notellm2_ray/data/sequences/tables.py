"""Sequences, blocks, examples and candidates as Arrow tables, from flat arrays of note codes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from notellm2_ray.core.schema import BLOCK_SCHEMA, CANDIDATE_SCHEMA, EXAMPLE_SCHEMA, SEQUENCE_SCHEMA
from notellm2_ray.data.arrays import offsets_of
from notellm2_ray.data.sequences.histories import Histories
from notellm2_ray.data.sequences.targets import Examples

_TIME = pa.timestamp("us", tz="UTC")


def sequence_table(histories: Histories, vocabulary: pa.Array) -> pa.Table:
    """SEQUENCE_SCHEMA, a row per user."""
    offsets = pa.array(histories.offsets, pa.int32())
    columns = (
        vocabulary.take(pa.array(histories.notes)),
        pa.array(histories.times, pa.int64()).cast(_TIME),
        histories.sessions,
    )
    lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
    return pa.table([histories.users, *lists], schema=SEQUENCE_SCHEMA)


def block_table(histories: Histories, numbers: np.ndarray, vocabulary: pa.Array) -> pa.Table:
    """BLOCK_SCHEMA, the blocks of all events except each user's last, which is the target.

    Args:
        numbers: (E,) the block of each event.
    """
    history = histories.positions < np.repeat(histories.lengths - 1, histories.lengths)
    owners, numbers, notes = histories.owners[history], numbers[history], histories.notes[history]
    starts = np.flatnonzero(np.append(True, (np.diff(owners) != 0) | (np.diff(numbers) != 0))[: len(owners)])
    offsets = pa.array(np.append(starts, len(owners)), pa.int32())
    return pa.table(
        [
            histories.users.take(pa.array(owners[starts])),
            pa.array(numbers[starts], pa.int32()),
            pa.ListArray.from_arrays(offsets, vocabulary.take(pa.array(notes))),
        ],
        schema=BLOCK_SCHEMA,
    )


def example_table(histories: Histories, examples: Examples, vocabulary: pa.Array) -> pa.Table:
    """EXAMPLE_SCHEMA, a row per example."""
    starts = histories.offsets[examples.users]
    offsets = offsets_of(examples.positions)
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], examples.positions)
    history = histories.notes[np.repeat(starts, examples.positions) + inside]
    targets = examples.targets(histories)
    times = pa.array(histories.times[targets], pa.int64()).cast(EXAMPLE_SCHEMA.field("timestamp").type)
    columns = [
        example_ids(histories, examples),
        histories.users.take(pa.array(examples.users)),
        pa.array(examples.blocks, pa.int32()),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vocabulary.take(pa.array(history))),
        vocabulary.take(pa.array(histories.notes[targets])),
        times,
    ]
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def example_ids(histories: Histories, examples: Examples) -> pa.Array:
    """(X,) ids: user_id/position of the target in the user's sequence."""
    users = histories.users.take(pa.array(examples.users)).to_pylist()
    numbers = examples.positions.tolist()
    return pa.array([f"{user}/{number}" for user, number in zip(users, numbers, strict=True)], pa.string())


def candidate_table(
    ids: pa.Array, targets: np.ndarray, negatives: np.ndarray, order_by: np.ndarray, vocabulary: pa.Array
) -> pa.Table:
    """CANDIDATE_SCHEMA, the candidates of one example after those of another, each in the order of its keys.

    Args:
        targets: (X,) note codes.
        negatives: (X, K) note codes.
        order_by: (X, K + 1) keys.
    """
    notes = np.column_stack([targets, negatives])
    labels = np.zeros(notes.shape, np.int8)
    labels[:, :1] = 1
    order = np.argsort(order_by, axis=1, kind="stable")
    notes, labels = np.take_along_axis(notes, order, 1), np.take_along_axis(labels, order, 1)
    owners = np.repeat(np.arange(len(targets)), notes.shape[1])
    columns = [ids.take(pa.array(owners)), vocabulary.take(pa.array(notes.ravel())), pa.array(labels.ravel())]
    return pa.table(columns, schema=CANDIDATE_SCHEMA)
