"""Checks on the recommender's tables: that no example gives its answer away, and that there is enough of everything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings

MAX_SHORT_SHARE = 0.01  # of the examples of a file, that may be set aside because too few notes existed by then


def check_examples(examples: pa.Table, sequences: pa.Table | None = None) -> None:
    """Raise unless every target is new to its user: not in the example's history, which is of its own user.

    Args:
        examples: EXAMPLE_SCHEMA.
        sequences: SEQUENCE_SCHEMA with the users' whole sequences; None: their notes are not looked at.

    Raises:
        DataError: naming an example at fault.
    """
    if len(pc.unique(examples["example_id"])) != examples.num_rows:
        raise DataError("two examples have the same id: user ids and numbers of targets must tell them apart")
    owners, history, targets = _coded(examples["history_ids"], examples["target_id"])
    _refuse(examples, owners[history == targets[owners]], "its target stands in its own history")
    if sequences is None:
        return
    users = pc.index_in(examples["user_id"], _flat(sequences["user_id"]))
    _refuse(examples, np.flatnonzero(users.is_null().to_numpy()), "its user has no sequence")
    rows = sequences.take(users)
    owners, notes, targets = _coded(rows["note_ids"], examples["target_id"])
    times = rows["timestamps"].combine_chunks().flatten().cast(pa.int64()).to_numpy()
    at = examples["timestamp"].cast(pa.int64()).to_numpy()
    # Each note stands once in a sequence, so a history is leak-free if it is what comes before the target.
    place = np.full(examples.num_rows, -1)
    found = np.flatnonzero(notes == targets[owners])
    place[owners[found]] = found - np.searchsorted(owners, owners[found])
    _refuse(examples, np.flatnonzero(place < 0), "its target is not in its user's sequence")
    lengths = pc.list_value_length(examples["history_ids"]).to_numpy()
    _refuse(examples, np.flatnonzero(place != lengths), "its history is not all that comes before its target")
    _refuse(examples, owners[found][times[found] != at[owners[found]]], "its timestamp is not its target's")


def check_candidates(examples: pa.Table, candidates: pa.Table, sequences: pa.Table, negatives: int) -> None:
    """Raise unless every example has its target and ``negatives`` distinct notes that its user never liked.

    Raises:
        DataError: naming an example at fault.
    """
    rows = pc.index_in(candidates["example_id"], _flat(examples["example_id"]))
    if rows.null_count:
        raise DataError("there are candidates of an example that does not exist")
    rows = rows.to_numpy()
    labels = candidates["label"].to_numpy()
    target = pc.equal(candidates["note_id"], examples["target_id"].take(pa.array(rows))).to_numpy()
    _refuse(examples, rows[target != (labels == 1)], "a candidate's label says another target than the example does")
    for label, wanted in ((1, 1), (0, negatives)):
        counts = np.bincount(rows[labels == label], minlength=examples.num_rows)
        _refuse(examples, np.flatnonzero(counts != wanted), f"not {wanted} candidates have the label {label}")
    users = sequences.take(pc.index_in(examples["user_id"], _flat(sequences["user_id"])))
    owners, liked, shown = _coded(users["note_ids"], candidates["note_id"])
    base = max(liked.max(initial=0), shown.max(initial=0)) + 1
    keys = rows * base + shown
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order][1:] == keys[order][:-1]]
    _refuse(examples, rows[again], "a candidate stands twice")
    wrong = np.isin(keys[labels == 0], owners * base + liked)
    _refuse(examples, rows[labels == 0][wrong], "a negative is a note that its user liked")


def check_tables(tables: Mapping[str, pa.Table], settings: CandidateSettings) -> None:
    """Look at the tables of one part of the users (``example_files.table_names``) as they will be published.

    Raises:
        DataError: an example's answer leaks.
    """
    files: dict[str, list[str]] = {"train": ["train"], "valid": ["valid"]}
    files["test"] = [name for name in settings.protocols if name != "published"]
    if "published" in settings.protocols:
        files["published"] = ["published"]
    for name, protocols in files.items():
        # The published construction leaves notes out of a history, so that its examples fit no sequence.
        check_examples(tables[name], None if name == "published" else tables["sequences"])
        count = settings.num_train_negatives if name == "train" else settings.num_negatives
        for protocol in protocols:
            check_candidates(tables[name], tables[f"candidates-{protocol}"], tables["sequences"], count)


def check_short(answers: Sequence[Mapping[str, Any]], settings: CandidateSettings) -> None:
    """Raise if more than a hundredth of the examples had to be set aside for want of negatives.

    Raises:
        DataError: with the numbers and the knobs.
    """
    for name in ("train", "valid", "test", "published"):
        short, all_ = (sum(answer.get(f"{name}_{key}", 0) for answer in answers) for key in ("short", "all"))
        if short <= MAX_SHORT_SHARE * all_:
            continue
        knob = "num_train_negatives" if name == "train" else "num_negatives"
        examples = (answer.get(f"{name}_short_example", "") for answer in answers)
        example = next(example for example in examples if example)
        remedy = (
            "let notes that were created later be negatives with candidates.existing_notes_only=false"
            if settings.max_negative_age_days is None
            else "raise candidates.max_negative_age_days (only null lets notes without created_at be negatives)"
        )
        raise DataError(
            f"{short} of {all_} {name} examples have fewer than candidates.{knob}={getattr(settings, knob)} notes to "
            f"draw negatives from ({example}): lower candidates.{knob}, give more notes, or {remedy}"
        )


def check_actions(spilt: Sequence[Mapping[str, Any]], settings: SequenceSettings) -> None:
    """Raise unless there is a positive event on a prepared note.

    Raises:
        DataError: with the actions that there are.
    """
    seen: dict[str, int] = {}
    for unit in spilt:
        for name, count in json.loads(unit["actions"]).items():
            seen[name] = seen.get(name, 0) + count
    unknown = sum(unit["unknown_note_events"] for unit in spilt)
    liked = sum(seen.get(name, 0) for name in set(settings.positive_actions))
    if liked > unknown:
        return
    present = ", ".join(f"{name} ({count})" for name, count in sorted(seen.items())) or "none"
    if liked:
        raise DataError(
            f"all {liked} events of sequences.positive_actions are on notes that were not prepared: run prepare again"
        )
    raise DataError(
        f"no event has an action of sequences.positive_actions ({', '.join(settings.positive_actions)}); the actions "
        f"present are: {present}. Set sequences.positive_actions to those that say a user liked a note"
    )


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
