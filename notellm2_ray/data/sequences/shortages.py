"""Checks that there are enough positive events and enough notes for negatives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings

MAX_SET_ASIDE_SHARE = 0.01  # of a file's examples: those with too few negatives


def check_negatives(counts: Sequence[Mapping[str, Any]], settings: CandidateSettings) -> None:
    """Check that few examples were set aside because there were too few negatives for them.

    Args:
        counts: :attr:`PartTables.counts` of every part of the users.

    Raises:
        DataError: more than 1% of the examples of a side were; the message has the numbers and the settings.
    """
    for name in ("train", "valid", "test", "published"):
        set_aside, all_ = (sum(part.get(f"{name}_{key}", 0) for part in counts) for key in ("set_aside", "all"))
        if set_aside <= MAX_SET_ASIDE_SHARE * all_:
            continue
        knob = "num_train_negatives" if name == "train" else "num_negatives"
        examples = (part.get(f"{name}_set_aside_example", "") for part in counts)
        example = next(example for example in examples if example)
        remedy = (
            "set candidates.existing_notes_only=false, so that notes created later can be negatives"
            if settings.max_negative_age_days is None
            else "raise candidates.max_negative_age_days (notes without created_at can be negatives only with null)"
        )
        raise DataError(
            f"{set_aside} of {all_} {name} examples have fewer than candidates.{knob}={getattr(settings, knob)} notes "
            f"to draw negatives from ({example}): lower candidates.{knob}, give more notes, or {remedy}"
        )


def check_actions(units: Sequence[Mapping[str, Any]], settings: SequenceSettings) -> None:
    """Check that there is a positive event on a prepared note.

    Args:
        units: the counts of every unit of events read.

    Raises:
        DataError: there is none; the message has the actions of the log.
    """
    seen: dict[str, int] = {}
    for unit in units:
        for name, count in json.loads(unit["actions"]).items():
            seen[name] = seen.get(name, 0) + count
    unknown = sum(unit["unknown_note_events"] for unit in units)
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
