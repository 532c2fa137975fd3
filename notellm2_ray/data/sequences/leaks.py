"""Checks that no example of the recommender gives its answer away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import CandidateSettings


def check_examples(examples: pa.Table, sequences: pa.Table | None = None) -> None:
    """Check that no target is in its example's history, and that the history is what its user liked before.

    Args:
        examples: EXAMPLE_SCHEMA.
        sequences: SEQUENCE_SCHEMA with the users' whole sequences; None: histories are not compared with them.

    Raises:
        DataError: naming an example that fails.
    """
    if len(pc.unique(examples["example_id"])) != examples.num_rows:
        raise DataError("two examples have the same id, so two users have")
    owners, history, targets = _coded(examples["history_ids"], examples["target_id"])
    _refuse(examples, owners[history == targets[owners]], "its target is in its own history")
    if sequences is None:
        return
    users = pc.index_in(examples["user_id"], _flat(sequences["user_id"]))
    _refuse(examples, np.flatnonzero(users.is_null().to_numpy()), "its user has no sequence")
    rows = sequences.take(users)
    owners, notes, targets = _coded(rows["note_ids"], examples["target_id"])
    times = rows["timestamps"].combine_chunks().flatten().cast(pa.int64()).to_numpy()
    at = examples["timestamp"].cast(pa.int64()).to_numpy()
    # A note is only once in a sequence, so a history has no leak if it is everything before the target.
    position = np.full(examples.num_rows, -1)
    found = np.flatnonzero(notes == targets[owners])
    position[owners[found]] = found - np.searchsorted(owners, owners[found])
    _refuse(examples, np.flatnonzero(position < 0), "its target is not in its user's sequence")
    lengths = pc.list_value_length(examples["history_ids"]).to_numpy()
    _refuse(examples, np.flatnonzero(position != lengths), "its history is not everything before its target")
    _refuse(examples, owners[found][times[found] != at[owners[found]]], "its timestamp is not that of its target")


def check_candidates(examples: pa.Table, candidates: pa.Table, sequences: pa.Table, negatives: int) -> None:
    """Check that every example has its target and ``negatives`` distinct notes that its user never liked.

    Raises:
        DataError: naming an example that fails.
    """
    rows = pc.index_in(candidates["example_id"], _flat(examples["example_id"]))
    if rows.null_count:
        raise DataError("there are candidates of an example that does not exist")
    rows = rows.to_numpy()
    labels = candidates["label"].to_numpy()
    target = pc.equal(candidates["note_id"], examples["target_id"].take(pa.array(rows))).to_numpy()
    _refuse(examples, rows[target != (labels == 1)], "the label of a candidate marks another target than the example")
    for label, wanted in ((1, 1), (0, negatives)):
        counts = np.bincount(rows[labels == label], minlength=examples.num_rows)
        _refuse(examples, np.flatnonzero(counts != wanted), f"the candidates with label {label} are not {wanted}")
    users = sequences.take(pc.index_in(examples["user_id"], _flat(sequences["user_id"])))
    owners, liked, shown = _coded(users["note_ids"], candidates["note_id"])
    base = max(liked.max(initial=0), shown.max(initial=0)) + 1
    keys = rows * base + shown
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order][1:] == keys[order][:-1]]
    _refuse(examples, rows[again], "a candidate is there twice")
    wrong = np.isin(keys[labels == 0], owners * base + liked)
    _refuse(examples, rows[labels == 0][wrong], "a negative is a note that its user liked")


def check_tables(tables: Mapping[str, pa.Table], settings: CandidateSettings) -> None:
    """Check the tables of one part of the users (``part_tables.table_names``).

    Raises:
        DataError: an example gives its answer away.
    """
    files: dict[str, list[str]] = {"train": ["train"], "valid": ["valid"]}
    files["test"] = [name for name in settings.protocols if name != "published"]
    if "published" in settings.protocols:
        files["published"] = ["published"]
    for name, protocols in files.items():
        # The published construction leaves notes out of a history, so its examples do not match the sequences.
        check_examples(tables[name], None if name == "published" else tables["sequences"])
        count = settings.num_train_negatives if name == "train" else settings.num_negatives
        for protocol in protocols:
            check_candidates(tables[name], tables[f"candidates-{protocol}"], tables["sequences"], count)


def _refuse(examples: pa.Table, at_fault: np.ndarray, why: str) -> None:
    if len(at_fault):
        example: Any = examples["example_id"][int(at_fault[0])].as_py()
        raise DataError(f"leak: example {example!r}, {why} ({len(np.unique(at_fault))} examples like this)")


def _coded(lists: pa.ChunkedArray, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of each element, code of each element, code of each value); equal strings have equal codes."""
    flat = lists.combine_chunks()
    lengths = pc.list_value_length(flat).to_numpy()
    elements = pc.list_flatten(flat)
    both = pa.chunked_array([elements, *values.chunks], pa.string()).combine_chunks().dictionary_encode()
    codes = both.indices.to_numpy().astype(np.int64)
    return np.repeat(np.arange(len(flat)), lengths), codes[: len(elements)], codes[len(elements) :]


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()
