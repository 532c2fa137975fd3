"""Ranking candidates and scores without any files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from notellm2_ray.core.schema import CANDIDATE_SCHEMA, EXAMPLE_SCHEMA
from notellm2_ray.evaluate.ranking.task import RankingTask

NUM_USERS, SIZE = 60, 6


def tables(num_users: int = NUM_USERS, size: int = SIZE) -> tuple[pa.Table, pa.Table]:
    """Candidates and examples: user u's target is t{u}, negatives n{u}-{i}."""
    candidates, examples = [], []
    for user in range(num_users):
        name = f"u{user}/3"
        examples.append(
            {"example_id": name, "user_id": f"u{user}", "block": 0, "history_ids": ["h"], "target_id": f"t{user}",
             "timestamp": 0}
        )  # fmt: skip
        notes = [f"t{user}", *(f"n{user}-{i}" for i in range(size - 1))]
        candidates += [{"example_id": name, "note_id": note, "label": int(note[0] == "t")} for note in notes]
    return pa.Table.from_pylist(candidates, CANDIDATE_SCHEMA), pa.Table.from_pylist(examples, EXAMPLE_SCHEMA)


def clicks(num_users: int = NUM_USERS) -> dict[str, int]:
    """The targets of the first ten users are cold."""
    return {f"t{user}": 1 + user % 3 for user in range(10, num_users)} | {"n0-0": 5}


def noisy(task: RankingTask, strength: float, seed: int) -> np.ndarray:
    """Random scores, higher for targets by the strength."""
    return np.random.default_rng(seed).normal(size=len(task.groups)) + strength * task.labels
