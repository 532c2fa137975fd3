"""Routes for notes: write, delete, read, search, embed, similar."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request  # at module level, because FastAPI looks up annotations there

from notellm2_ray.core.schema import Note
from notellm2_ray.index.vectors import first_numbers
from notellm2_ray.live.table import newest_if_gone
from notellm2_ray.serve.errors import NotFoundError, OpenAiError, UnavailableError
from notellm2_ray.serve.http import schemas
from notellm2_ray.serve.http.cards import cards
from notellm2_ray.serve.http.checks import check_count, check_ids, check_k, check_text, prepare_notes
from notellm2_ray.serve.http.similar import find_similar

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.gateway import Gateway

WRITE_SECONDS = 30.0


def build(gateway: Gateway) -> Any:
    """The router."""
    from fastapi import APIRouter
    from starlette.responses import Response

    routes = APIRouter(tags=["notes"])

    @routes.put("/v1/notes", response_model=schemas.UpsertAnswer)
    async def upsert(body: schemas.UpsertRequest) -> Any:
        """Write new notes, or new versions of existing ones; 200 means that they are on the disk."""
        return await upsert_notes(gateway, body.notes)

    @routes.post("/v1/notes/delete", response_model=schemas.DeleteAnswer)
    async def delete(body: schemas.DeleteRequest) -> Any:
        """Delete notes; 200 means that the deletion is on the disk."""
        check_count(body.note_ids, gateway.limits.ids, "note_ids")
        check_ids(body.note_ids, gateway.limits, "note_ids")
        done = await gateway.writer.call("delete", body.note_ids, seconds=WRITE_SECONDS)
        await gateway.wait_until_applied(done.seq)
        return done._asdict()

    @routes.post("/v1/notes/search", response_model=schemas.CardsAnswer)
    async def search(body: schemas.SearchRequest) -> Any:
        """Notes whose title contains the text, in upper or lower case, or that have it as a topic or as their id."""
        check_text(body.text, gateway.limits.title_characters, "text")
        ids = await asyncio.to_thread(
            newest_if_gone, gateway.follower.reading, lambda table: search_titles(table, body.text, body.limit)
        )
        found = await cards(gateway, ids)
        return {"notes": [found[note_id] for note_id in ids if note_id in found]}

    @routes.post("/v1/embeddings", response_model=schemas.EmbeddingsAnswer)
    async def embeddings(body: schemas.EmbeddingsRequest) -> Any:
        """Unit vectors of texts or notes, in the format of OpenAI's endpoint."""
        return await embed(gateway, body)

    @routes.post("/v1/similar", response_model=schemas.SimilarAnswer, responses={404: _NOT_FOUND})
    async def similar(body: schemas.SimilarRequest) -> Any:
        """The nearest notes of a stored note, given by its id, or of a note in the request."""
        check_k(body.k, gateway.limits.k)
        return Response(await find_similar(gateway, body), media_type="application/json")

    @routes.get("/v1/notes/{note_id:path}/image", responses={200: {"content": {"image/*": {}}}, 404: _NOT_FOUND})
    async def image(note_id: str, request: Request) -> Any:
        """A note's image as stored, or as JPEG where browsers do not show it (TIFF, HEIC).

        (For the card of a note whose id ends in /image, escape that slash as %2F.)
        """
        check_ids([note_id], gateway.limits, "note_id")
        whole = f"{note_id}/image"
        if request.scope.get("raw_path", b"").lower().endswith(b"%2fimage"):
            return await get(whole)
        (note,) = await gateway.notes([note_id])
        if note is None:
            found = await cards(gateway, [whole])
            if whole in found:
                return found[whole]
            raise _missing(note_id)
        data = note.image
        if data is None:
            raise NotFoundError(f"note {note_id!r} has no image", "note_id")
        # The image is from an unknown source: browsers must not treat it as anything but an image.
        headers = {"x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox"}
        data, kind = await gateway.images.for_browser(data)
        return Response(data, media_type=kind, headers=headers)

    @routes.get("/v1/notes/{note_id:path}", response_model=schemas.NoteCard, responses={404: _NOT_FOUND})
    async def get(note_id: str) -> Any:
        """A note's card."""
        check_ids([note_id], gateway.limits, "note_id")
        found = await cards(gateway, [note_id])
        if note_id not in found:
            raise _missing(note_id)
        return found[note_id]

    return routes


_NOT_FOUND: dict[str, Any] = {"model": schemas.ErrorAnswer, "description": "no such note"}


def _missing(note_id: str) -> NotFoundError:
    return NotFoundError(f"there is no note {note_id!r}", "note_id")


async def upsert_notes(gateway: Gateway, notes: Sequence[schemas.Note]) -> dict[str, Any]:
    """Check, embed and commit notes; if a request has a note twice, the later version counts."""
    check_count(notes, gateway.limits.notes, "notes")
    notes = list({note.note_id: note for note in notes}.values())
    with gateway.figures.timing("prepare_notes"):
        prepared, problems = await prepare_notes(notes, gateway.limits, gateway.fetcher, gateway.images)
    rejected = [{"note_id": notes[row].note_id, "reason": reason} for row, reason in problems.items()]
    columns = gateway.follower.state.table.columns
    created = {note.note_id: note.created_at for note in notes}
    if not prepared:
        return {"seq": -1, "upserted": 0, "rejected": rejected}
    seq, written, refused = await _write(gateway, prepared, columns, created)
    await gateway.wait_until_applied(seq)
    return {"seq": seq, "upserted": written, "rejected": rejected + refused}


async def _write(
    gateway: Gateway, notes: Sequence[Note], columns: Sequence[str], created: dict[str, Any]
) -> tuple[int, int, list[dict[str, str]]]:
    """Embed notes and commit them.

    Returns:
        the commit's number (-1: nothing was written), the number of written notes, and the refused notes with reasons.

    Raises:
        UnavailableError: the service switched to another model twice meanwhile.
    """
    for _ in range(2):
        vectors = await gateway.encode(notes, columns, gateway.readiness.writing_model)
        refused = [{"note_id": notes[row].note_id, "reason": reason} for row, reason in vectors.problems.items()]
        written = vectors.live_notes(notes, created)
        if not written:
            return -1, 0, refused
        done = await gateway.writer.call("upsert", written, vectors.fingerprint, seconds=WRITE_SECONDS)
        # This replica's index may switch to the writer's table later.
        gateway.readiness.writing_model = done.model_fingerprint
        if done.seq is not None:
            return done.seq, len(written), refused
    raise UnavailableError("the service is switching to another model: try again")


async def embed(gateway: Gateway, body: schemas.EmbeddingsRequest) -> dict[str, Any]:
    """Embeddings in OpenAI's format; a text becomes a note with only that content.

    Raises:
        OpenAiError: a value in the request is wrong.
    """
    inputs: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
    check_count(inputs, gateway.limits.notes, "input")
    if not inputs:
        raise OpenAiError("input is empty: send at least one text", "input")
    index = gateway.index
    if body.model and body.model not in ("notellm2", index.model_fingerprint):
        raise OpenAiError(f"there is no model {body.model[:100]!r} here: ask for 'notellm2'", "model")
    given = [_note_of(row, one) for row, one in enumerate(inputs)]
    prepared, problems = await prepare_notes(given, gateway.limits, gateway.fetcher, gateway.images)
    if not problems:
        vectors = await gateway.encode(prepared, model=index.model_fingerprint)
        problems = vectors.problems
    for row, reason in problems.items():
        raise OpenAiError(reason, f"input.{row}")
    lengths = vectors.lengths or (index.dim,)
    if body.dimensions not in (None, *lengths):
        known = " or ".join(map(str, lengths))
        raise OpenAiError(f"the model has {known} dimensions: leave dimensions out, or send {known}", "dimensions")
    data = [
        {"object": "embedding", "index": row, "embedding": _shown(vector, body.encoding_format)}
        for row, vector in enumerate(first_numbers(vectors.columns["embedding"], body.dimensions))
    ]
    usage = {"prompt_tokens": vectors.tokens, "total_tokens": vectors.tokens}
    return {"object": "list", "data": data, "model": vectors.fingerprint, "usage": usage}


def _note_of(row: int, given: str | schemas.QueryNote) -> schemas.Note:
    """An input as a note.

    Raises:
        OpenAiError: nothing in it could be embedded.
    """
    note = (schemas.QueryNote(content=given) if isinstance(given, str) else given).named(f"input-{row}")
    texts = (note.title, note.content, *note.topics)
    if note.image is None and note.image_url is None and not any(text.strip() for text in texts):
        raise OpenAiError(f"input {row} is empty, and an empty text has no vector: leave it out", f"input.{row}")
    return note


def _shown(vector: np.ndarray, encoding: str) -> list[float] | str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


def search_titles(table: Any, text: str, limit: int) -> list[str]:
    """Ids of notes that have the text in their title, as a topic or as their id; stops scanning at ``limit``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: list[str] = []
    for batch in table.dataset.scanner(columns=["note_id", "title", "topics"], filter="NOT deleted").to_batches():
        hits = pc.or_(
            pc.match_substring(batch.column("title"), text, ignore_case=True), pc.equal(batch.column("note_id"), text)
        )
        topics = batch.column("topics")
        carrying = pc.list_parent_indices(topics).filter(
            pc.equal(pc.utf8_lower(pc.list_flatten(topics)), pa.scalar(text.lower()))
        )
        mask = hits.to_numpy(zero_copy_only=False).astype(bool)
        mask[carrying.to_numpy()] = True
        found += batch.column("note_id").filter(pa.array(mask)).to_pylist()
        if len(found) >= limit:
            break
    return found[:limit]
