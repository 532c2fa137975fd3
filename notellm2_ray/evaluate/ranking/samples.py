"""Test users as the report shows them: their history, their preference in words, and their candidates as ranked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import Note
from notellm2_ray.evaluate.ranking.task import RankingTask


def sample_users(
    task: RankingTask,
    scores: np.ndarray,
    examples: pa.Table,
    blocks: pa.Table,
    *,
    get_notes: Callable[[Sequence[str]], Mapping[str, Note]],
    summaries: Mapping[str, str],
    preferences: Mapping[tuple[str, int], str],
    method: str,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Some test users with their history, preferences and ranked candidates.

    Args:
        task: the candidates.
        scores: (R,) of the method shown.
        examples: EXAMPLE_SCHEMA of the task.
        blocks: BLOCK_SCHEMA; a history whose blocks are not there is shown as one block.
        get_notes: note ids to notes by id; notes that do not exist may be missing. It is called once.
        summaries: note id to image summary, for notes that have one.
        preferences: (user, block) to the preference after that block; empty if the method reads no preferences.
        method: name of the method, as shown.
        count: number of users, if there are that many.
        seed: of the choice of users.

    Returns:
        For each user ``method``, ``user_id``, ``target_rank`` (ties count against the target); ``blocks``: number,
        notes, preference (or None); ``candidates``, best first: notes with rank, score and is_target. A note has
        note_id, title, image (encoded or None) and summary (or None).
    """
    rng = np.random.default_rng(stream_seed(seed, "report users"))
    chosen = np.sort(rng.choice(task.num_examples, size=min(count, task.num_examples), replace=False))
    wanted = set(task.example_ids[chosen])
    rows = [row for row in examples.to_pylist() if row["example_id"] in wanted]
    by_id = {row["example_id"]: row for row in rows}
    ids = {note for row in rows for note in row["history_ids"]} | set(task.note_ids[np.isin(task.groups, chosen)])
    notes = get_notes(sorted(ids))

    def shown(note_id: str) -> dict[str, Any]:
        note = notes.get(note_id, Note(note_id))
        title = note.title or note.content[:60]
        return {"note_id": note_id, "title": title, "image": note.image, "summary": summaries.get(note_id)}

    own_blocks = _blocks_by_user(blocks, {row["user_id"] for row in rows})
    found = []
    for example in chosen:
        row = by_id[task.example_ids[example]]
        parts = _history(row, own_blocks.get(row["user_id"], []))
        candidates = [{**shown(task.note_ids[at]), **rest} for at, rest in _ranked(task, scores, example)]
        found.append(
            {
                "method": method,
                "user_id": row["user_id"],
                "target_rank": next(one["rank"] for one in candidates if one["is_target"]),
                "blocks": [
                    {
                        "number": number,
                        "notes": [shown(note) for note in ids],
                        "preference": preferences.get((row["user_id"], number)),
                    }
                    for number, ids in parts
                ],
                "candidates": candidates,
            }
        )
    return found


def _ranked(task: RankingTask, scores: np.ndarray, example: int) -> list[tuple[int, dict[str, Any]]]:
    """Rows of an example, best first; the target comes after the candidates that tie with it."""
    rows = task.candidates_of(example)
    order = rows[np.lexsort((task.labels[rows], -scores[rows]))]
    return [
        (int(at), {"rank": rank, "score": float(scores[at]), "is_target": bool(task.labels[at])})
        for rank, at in enumerate(order, start=1)
    ]


def _blocks_by_user(blocks: pa.Table, users: set[str]) -> dict[str, list[tuple[int, list[str]]]]:
    found: dict[str, list[tuple[int, list[str]]]] = {}
    mask = pa.array([user in users for user in blocks.column("user_id").to_pylist()], pa.bool_())
    for row in blocks.filter(mask).to_pylist():
        found.setdefault(row["user_id"], []).append((row["block"], row["note_ids"]))
    return {user: sorted(rows) for user, rows in found.items()}


def _history(row: Mapping[str, Any], blocks: Sequence[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Blocks up to the example's own; if they do not make up its history, the history as one block."""
    mine = [(number, notes) for number, notes in blocks if number <= row["block"]]
    if [note for _, notes in mine for note in notes] == row["history_ids"]:
        return mine
    return [(row["block"], row["history_ids"])] if row["history_ids"] else []
