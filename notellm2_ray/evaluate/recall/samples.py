"""Query notes with their nearest notes, which the report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import Note
from notellm2_ray.evaluate.recall.task import RetrievalTask


def sample_neighbors(
    task: RetrievalTask,
    ids: np.ndarray,
    vectors: np.ndarray,
    get_notes: Callable[[Sequence[str]], Sequence[Note]],
    *,
    method: str,
    count: int,
    k: int = 8,
    seed: int = 42,
) -> list[dict[str, Any]]:
    """Some query notes with their ``k`` nearest notes of the pool and their true targets.

    A seed picks the same queries for every method, so that a reader can compare methods.

    Args:
        task: the test pairs.
        ids: (N,) note ids of the embedding table.
        vectors: (N, D) float32, unit length.
        get_notes: note ids to notes, like ``NoteStore.get``.
        method: name of the method, as shown.
        count: number of query notes, if there are that many.
        k: number of neighbours.
        seed: of the choice of queries.

    Returns:
        For each query ``method``, ``query`` (note_id, title, image) and ``neighbors``, nearest first: note_id, title,
        image (encoded bytes or None), score, rank (1 is nearest) and is_target. Targets beyond the ``k`` nearest
        follow.
    """
    row_of = {note_id: row for row, note_id in enumerate(ids)}
    pool = [note_id for note_id in task.pool_ids if note_id in row_of]
    matrix = vectors[[row_of[note_id] for note_id in pool]]
    queries = [note_id for note_id in dict.fromkeys(task.query_ids) if note_id in row_of]
    rng = np.random.default_rng(stream_seed(seed, "report samples"))
    chosen = rng.choice(len(queries), size=min(count, len(queries)), replace=False)
    return [
        _sample(queries[at], task, pool, matrix @ vectors[row_of[queries[at]]], get_notes, method, k)
        for at in np.sort(chosen)
    ]


def _sample(
    query: str,
    task: RetrievalTask,
    pool: Sequence[str],
    scores: np.ndarray,
    get_notes: Callable[[Sequence[str]], Sequence[Note]],
    method: str,
    k: int,
) -> dict[str, Any]:
    targets = set(task.target_ids[task.query_ids == query])
    order = [row for row in np.argsort(-scores, kind="stable") if pool[row] != query]
    shown = [(rank, row) for rank, row in enumerate(order, start=1) if rank <= k or pool[row] in targets]
    asked, *found = get_notes([query, *(pool[row] for _, row in shown)])
    neighbors = [
        {**_picture(note), "score": float(scores[row]), "rank": rank, "is_target": note.note_id in targets}
        for (rank, row), note in zip(shown, found, strict=True)
    ]
    return {"method": method, "query": _picture(asked), "neighbors": neighbors}


def _picture(note: Note) -> dict[str, Any]:
    return {"note_id": note.note_id, "title": note.title or note.content[:60], "image": note.image}
