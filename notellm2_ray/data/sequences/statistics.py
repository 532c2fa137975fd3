"""Statistics of the sequences: counts, lengths and sparsity, as in MLLM-MSR's tables of its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from notellm2_ray.core.settings import CandidateSettings
from notellm2_ray.data.sequences.split import SIDES, UserSplit

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
_PLAIN = (
    *("users", "interactions", "tied_events", "tied_targets", "cold_users", "untested_users"),
    *("truncated_users", "truncated_events", "blocks"),
)


def tally(values: np.ndarray) -> np.ndarray:
    """A histogram as one int64 array: value, its count, value, its count, ..."""
    return np.column_stack(np.unique(values, return_counts=True)).astype(np.int64).ravel()


def describe(tallies: Iterable[np.ndarray]) -> dict[str, float]:
    """Count, mean and quantiles of the values behind some :func:`tally`; without values, only the count.

    A quantile is one of the values: the smallest such that this share of the values is at most as large.
    """
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(np.reshape(one, (-1, 2)) for one in tallies)])
    if not len(pairs):
        return {"count": 0}
    values, where = np.unique(pairs[:, 0], return_inverse=True)
    counts = np.bincount(where, weights=pairs[:, 1]).astype(np.int64)
    below = np.cumsum(counts)
    positions = {name: np.searchsorted(below, max(1, np.ceil(share * below[-1]))) for name, share in QUANTILES.items()}
    summary: dict[str, float] = {"count": int(below[-1]), "mean": float(values @ counts / below[-1])}
    return summary | {name: int(values[index]) for name, index in positions.items()}


def add_up(counts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sums, by name, of the whole numbers in several mappings; other values are left out."""
    total: dict[str, int] = {}
    for part in counts:
        for name, value in part.items():
            if isinstance(value, int):
                total[name] = total.get(name, 0) + value
    return total


def sequence_statistics(
    counts: Sequence[Mapping[str, Any]],
    units: Sequence[Mapping[str, Any]],
    *,
    num_notes: int,
    split: UserSplit,
    settings: CandidateSettings,
) -> dict[str, Any]:
    """The contents of statistics.json.

    Interactions are distinct pairs of user and note. Lengths are those of whole sequences, before
    ``sequences.max_events``. Sparsity is the share of (user, candidate note) pairs without an interaction.

    Args:
        counts: :attr:`PartTables.counts` of every part of the users.
        units: the counts of every unit of events read.
        num_notes: notes that may be a candidate.
    """
    total = add_up(counts)
    kinds = [name for name in (*SIDES, "published") if f"{name}_examples" in total]
    statistics: dict[str, Any] = {
        **{name: total[name] for name in _PLAIN},
        "notes": num_notes,
        "sparsity": 1.0 - total["interactions"] / max(total["users"] * num_notes, 1),
        "sequence_length": describe(part["lengths"] for part in counts),
        "unknown_note_events": sum(unit["unknown_note_events"] for unit in units),
        "negatives_per_example": {
            "train": settings.num_train_negatives,
            **dict.fromkeys(("valid", *settings.protocols), settings.num_negatives),
        },
    }
    for name in kinds:
        statistics[f"{name}_examples"] = total[f"{name}_examples"]
        statistics[f"{name}_examples_set_aside"] = total[f"{name}_set_aside"]
        statistics[f"{name}_targets_never_clicked"] = total[f"{name}_targets_never_clicked"]
        statistics[f"{name}_history_length"] = describe(part[f"{name}_history"] for part in counts)
    if split.by_time:
        times = (str(np.datetime64(bound, "us")) for bound in split.bounds)
        statistics |= dict(zip(("validation_from", "test_from"), times, strict=True))
    return statistics


def format_statistics(statistics: Mapping[str, Any]) -> str:
    """The statistics as text: two lines about the data set, and one for each set of examples."""
    lines = [
        f"{statistics['users']:,} users ({statistics['cold_users']:,} without a target; "
        f"{statistics['untested_users']:,} beyond candidates.max_test_users), "
        f"{statistics['notes']:,} notes, {statistics['interactions']:,} interactions, sparsity "
        f"{statistics['sparsity']:.2%}",
        f"events of a user: {_lengths(statistics['sequence_length'])}; {statistics['truncated_users']:,} users keep "
        f"only their last ones; {statistics['blocks']:,} blocks",
    ]
    for kind in (*SIDES, "published"):
        if f"{kind}_examples" in statistics:
            lines.append(
                f"{kind}: {statistics[f'{kind}_examples']:,} examples, histories of "
                f"{_lengths(statistics[f'{kind}_history_length'])} events, "
                f"{statistics[f'{kind}_targets_never_clicked']:,} targets without another click"
            )
    return "\n".join(lines)


def _lengths(described: Mapping[str, float]) -> str:
    if not described["count"]:
        return "none"
    return (
        f"{described['min']:,} to {described['max']:,} (mean {described['mean']:.1f}, median {described['median']:,})"
    )
