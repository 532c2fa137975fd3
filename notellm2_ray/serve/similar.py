"""The hot path: nearest notes, answered as JSON bytes."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.index.live_search import Filter, Hits
from notellm2_ray.serve import schemas
from notellm2_ray.serve.checks import check_count, check_ids, prepare_note
from notellm2_ray.serve.errors import InvalidError

if TYPE_CHECKING:
    from notellm2_ray.serve.gateway import Gateway

_MODALITIES = {"image": "embedding_image", "text": "embedding_text"}


async def find_similar(gateway: Gateway, body: schemas.SimilarRequest) -> bytes:
    """The answer of ``/v1/similar``."""
    from pydantic_core import to_json

    exclude, where = index_filter(gateway, body.filter) if body.filter else ((), None)
    state = gateway.follower.state  # table, index and seq that belong together
    own: dict[str, np.ndarray] = {}
    if body.note_id is not None:
        check_ids([body.note_id], gateway.limits, "note_id")
        hits = await gateway.search(body.note_id, body.k, exclude, where)
    else:
        assert body.note is not None
        own = await query_vectors(gateway, body.note, state.table.columns if body.explain else ("embedding",))
        hits = await gateway.search(own["embedding"], body.k, exclude, where)
    results: list[dict[str, Any]] = [
        {"note_id": note_id, "score": score} for note_id, score in zip(hits.ids, hits.scores.tolist(), strict=True)
    ]
    if body.explain:
        await explain(gateway, body.note_id, own, hits, results)
    info = state.index.info()
    return to_json(
        {
            "query": body.note_id,
            "results": results,
            "index": {"version": state.seq, "fresh": info["fresh"], "size": info["notes"]},
        }
    )


async def query_vectors(gateway: Gateway, note: schemas.Note, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """(D,) vectors of a note that is given with the request.

    Raises:
        InvalidError: it cannot be embedded.
    """
    try:
        prepared = await prepare_note(note, gateway.limits, gateway.fetcher, gateway.images)
    except DataError as error:
        raise InvalidError(str(error), "note") from None
    vectors = await gateway.encode([prepared], columns)
    if vectors.problems:
        raise InvalidError(vectors.problems[0], "note")
    return {name: matrix[0] for name, matrix in vectors.columns.items()}


def index_filter(gateway: Gateway, given: schemas.Filter) -> tuple[list[str], Filter | None]:
    """What the index is told of a request's filter: ids to leave out, and conditions."""
    limits = gateway.limits
    check_count(given.exclude, limits.ids, "exclude")
    check_ids(given.exclude, limits, "filter.exclude")
    check_count(given.topics_any, limits.topics, "topics_any")
    check_count(given.topics_all, limits.topics, "topics_all")
    where = Filter(
        topics=frozenset(given.topics_any),
        all_topics=frozenset(given.topics_all),
        created_from=_microseconds(given.created_after),
        created_to=_microseconds(given.created_before),
    )
    return given.exclude, None if where == Filter() else where


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1_000_000)


async def explain(
    gateway: Gateway, query_id: str | None, own: dict[str, np.ndarray], hits: Hits, results: list[dict[str, Any]]
) -> None:
    """Add cards, and the cosines of image and text apart where the table has those vectors."""
    from notellm2_ray.serve.note_routes import cards

    index = gateway.index
    shown = await cards(gateway, hits.ids)
    columns = {name: column for name, column in _MODALITIES.items() if column in index.others}
    by_column: dict[str, list[float | None]] = {}
    for name, column in columns.items():
        if query_id is not None:
            by_column[name] = index.similarity(query_id, hits.ids, column)
        else:
            vectors = [index.vector(note_id, column) for note_id in hits.ids]
            by_column[name] = [None if one is None else float(one @ own[column]) for one in vectors]
    for row, result in enumerate(results):
        there = shown.get(hits.ids[row])
        if there is not None:
            result["note"] = there.model_dump(mode="json")
        if columns:
            result["by_modality"] = {name: by_column[name][row] for name in columns}
