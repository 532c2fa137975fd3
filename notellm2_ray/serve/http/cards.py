"""Notes as shown in answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from notellm2_ray.serve.http import schemas

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.gateway import Gateway


async def cards(gateway: Gateway, note_ids: Sequence[str]) -> dict[str, schemas.NoteCard]:
    """Cards by note id; unknown notes are left out."""
    found = await gateway.cards(note_ids)
    return {note_id: schemas.NoteCard(**one._asdict()) for note_id, one in found.items()}
