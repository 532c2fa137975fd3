"""Similar notes, answered as JSON bytes: the most frequent request, so its answer bypasses FastAPI's serialisation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.search import Filter, Hits
from notellm2_ray.serve.errors import InvalidError
from notellm2_ray.serve.http import schemas
from notellm2_ray.serve.http.cards import cards
from notellm2_ray.serve.http.checks import check_count, check_ids, prepare_notes
from notellm2_ray.serve.variety import arrange

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.gateway import Gateway

VARIETY = 4  # so many times the wanted results are looked at for diversity and near duplicates
_MOST_FETCHED = 4000
_MODALITIES = {"image": "embedding_image", "text": "embedding_text"}


async def find_similar(gateway: Gateway, body: schemas.SimilarRequest) -> bytes:
    """The answer of ``/v1/similar``."""
    from pydantic_core import to_json

    exclude, where = index_filter(gateway, body.filter) if body.filter else ((), None)
    state = gateway.follower.state  # read once, so that table, index and seq belong together
    own: dict[str, np.ndarray] = {}
    query: str | np.ndarray
    model: str | None = None
    if body.note_id is not None:
        check_ids([body.note_id], gateway.limits, "note_id")
        query = body.note_id
    else:
        assert body.note is not None
        columns = state.table.columns if body.explain else ("embedding",)
        own, model = await query_vectors(gateway, body.note, columns)
        # The service may have switched to a new model while the note was embedded.
        state = gateway.follower.state
        if model != state.index.model_fingerprint:
            own, model = await query_vectors(gateway, body.note, columns)
        query = own["embedding"]

    async def search(k: int) -> Hits:
        return await gateway.search(query, k, exclude, where, index=state.index, model=model)

    folded: Folding | None = None
    if body.diversity or body.fold_above is not None:
        hits, folded = await varied(state.index, body, query, search)
    else:
        hits = await search(body.k)
    results: list[dict[str, Any]] = [
        {"note_id": note_id, "score": score} for note_id, score in zip(hits.ids, hits.scores.tolist(), strict=True)
    ]
    if folded is not None:
        for result, duplicates in zip(results, folded.results, strict=True):
            result["duplicates"] = duplicates
    if body.explain:
        await explain(gateway, state.index, body.note_id, own, hits, results)
    info = state.index.info()
    return to_json(
        {
            "query": body.note_id,
            "results": results,
            **({} if folded is None else {"duplicates": folded.query}),
            "index": {"version": state.seq, "fresh": info["fresh"], "size": info["notes"]},
        }
    )


class Folding(NamedTuple):
    """Ids of the near duplicates that are not results of their own."""

    results: list[list[str]]  # of each result
    query: list[str]


async def varied(
    index: LiveIndex, body: schemas.SimilarRequest, query: str | np.ndarray, search: Callable[[int], Awaitable[Hits]]
) -> tuple[Hits, Folding | None]:
    """Hits as ``diversity`` and ``fold_above`` ask, out of several times as many, and what was folded."""
    known = vectors_of(index, [query]) if isinstance(query, str) else query[None]
    asked = VARIETY * body.k
    while True:
        hits = await search(asked)
        vectors = await asyncio.to_thread(vectors_of, index, hits.ids)
        found = await asyncio.to_thread(arrange, hits.scores, vectors, body.k, body.diversity, body.fold_above, known)
        if len(found.rows) >= body.k or len(hits.ids) < asked or asked >= _MOST_FETCHED:
            break
        asked *= VARIETY
    chosen = Hits([hits.ids[row] for row in found.rows], hits.scores[found.rows])
    if body.fold_above is None:
        return chosen, None
    of_results = [[hits.ids[row] for row in found.duplicates.get(kept, ())] for kept in found.rows]
    return chosen, Folding(of_results, [hits.ids[row] for row in found.of_known])


def vectors_of(index: LiveIndex, note_ids: Sequence[str]) -> np.ndarray:
    """(N, D) vectors of notes; zeros for one that was deleted meanwhile, which is like no other then."""
    found = [index.vector(note_id) for note_id in note_ids]
    nothing = np.zeros(index.dim, np.float32)
    return np.array([nothing if one is None else one for one in found], np.float32).reshape(-1, index.dim)


async def query_vectors(
    gateway: Gateway, note: schemas.QueryNote, columns: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], str]:
    """(D,) vectors of a note in the request, and the fingerprint of their model.

    Raises:
        InvalidError: the note cannot be embedded.
    """
    prepared, problems = await prepare_notes([note.named("query")], gateway.limits, gateway.fetcher, gateway.images)
    if problems:
        raise InvalidError(problems[0], "note")
    vectors = await gateway.encode(prepared, columns)
    if vectors.problems:
        raise InvalidError(vectors.problems[0], "note")
    return {name: matrix[0] for name, matrix in vectors.columns.items()}, vectors.fingerprint


def index_filter(gateway: Gateway, given: schemas.Filter) -> tuple[list[str], Filter | None]:
    """A request's filter for the index: ids to exclude, and conditions."""
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
    gateway: Gateway,
    index: LiveIndex,
    query_id: str | None,
    own: dict[str, np.ndarray],
    hits: Hits,
    results: list[dict[str, Any]],
) -> None:
    """Add cards, and separate cosines of images and texts if the searched index has those vectors."""
    shown = await cards(gateway, hits.ids)
    # The note in the request may have vectors of other columns than the searched index.
    known = set(index.others) if query_id is not None else own.keys() & set(index.others)
    columns = {name: column for name, column in _MODALITIES.items() if column in known}
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
