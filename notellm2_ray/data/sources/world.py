"""The synthetic world as a source: raw notes and events, captioned pictures, and the hidden factors of the notes.

:mod:`notellm2_ray.data.world` says what the world is, and why it favours no method.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.sources import Source
from notellm2_ray.data.sources import SourceTables
from notellm2_ray.data.world.broken import NOTE_BREAKAGES
from notellm2_ray.data.world.draws import choices, uniforms
from notellm2_ray.data.world.factors import LOG_START, telling, traits
from notellm2_ray.data.world.images import draw_image
from notellm2_ray.data.world.lexicon import lexicon
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.data.world.texts import write
from notellm2_ray.data.world.users import Impressions, impressions

if TYPE_CHECKING:
    import ray.data

NOTES_PER_BLOCK = 500
EVENTS_PER_BLOCK = 40_000
_TIME = pa.timestamp("us", tz="UTC")
_RAW_NOTES = pa.schema(
    [
        ("note_id", pa.string()),
        ("title", pa.string()),
        ("topics", pa.list_(pa.string())),
        ("content", pa.string()),
        ("image", pa.binary()),
        ("created_at", _TIME),
        ("_source", pa.string()),
    ]
)


def world_tables(settings: WorldSettings, seed: int) -> SourceTables:
    """The world's raw rows as lazy Ray datasets, broken rows included; Ray must be connected.

    A block of notes or users is made when it is read. Only the catalogue of notes that users can be shown is held in
    memory, some 100 bytes a note in each worker.

    Returns:
        notes: ``num_notes`` rows; events: about ``num_users * events_per_user`` views, and the clicks that followed.
    """
    import ray.data

    def stream(rows: int, per_block: int, make: Any) -> ray.data.Dataset:
        numbers = ray.data.range(rows, override_num_blocks=max(1, -(-rows // per_block)))
        return numbers.map_batches(partial(_from_batch, make, settings, seed), batch_format="pyarrow", batch_size=None)

    return SourceTables(
        notes=stream(settings.num_notes, NOTES_PER_BLOCK, raw_notes),
        events=stream(settings.num_users, max(1, EVENTS_PER_BLOCK // settings.events_per_user), raw_events),
    )


def _from_batch(make: Any, settings: WorldSettings, seed: int, batch: pa.Table) -> pa.Table:
    return make(settings, seed, batch["id"].to_numpy())


def raw_notes(settings: WorldSettings, seed: int, index: np.ndarray) -> pa.Table:
    """Raw rows of the notes numbered ``index`` (N,), in that order; they depend on nothing but the arguments.

    A broken row is one of :data:`~notellm2_ray.data.world.broken.NOTE_BREAKAGES`, or repeats an earlier note.
    """
    kinds = choices(seed, "note breakage", index, len(NOTE_BREAKAGES) + 1)
    healthy = traits(settings, seed, index).healthy
    again = np.array(
        [
            _healthy_before(settings, seed, int(i)) if not well and kind == len(NOTE_BREAKAGES) else i
            for i, well, kind in zip(index, healthy, kinds, strict=True)
        ]
    )
    rows = _write_notes(settings, seed, again)
    for position, (i, well, kind) in enumerate(zip(index, healthy, kinds, strict=True)):
        rows[position]["_source"] = f"world/notes:{i}"
        if not well and kind < len(NOTE_BREAKAGES):
            rows[position] = NOTE_BREAKAGES[kind](rows[position])
        elif not well and again[position] == i:  # no earlier note to repeat
            rows[position] = NOTE_BREAKAGES[0](rows[position])
    return pa.Table.from_pylist(rows, schema=_RAW_NOTES)


def _healthy_before(settings: WorldSettings, seed: int, number: int) -> int:
    for start in range(number, 0, -64):
        near = np.arange(max(0, start - 64), start)
        well = np.flatnonzero(traits(settings, seed, near).healthy)
        if len(well):
            return int(near[well[-1]])
    return number


def _write_notes(settings: WorldSettings, seed: int, index: np.ndarray) -> list[dict[str, Any]]:
    words = lexicon(settings.language)
    hidden, tells = traits(settings, seed, index), telling(settings, seed, index)
    rows = []
    for position, number in enumerate(index.tolist()):
        subject, style = int(hidden.subject[position]), int(hidden.style[position])
        text = write(
            words,
            stream_seed(seed, "world", "text", number),
            subject,
            style,
            tells.unit_subject[position].tolist(),
            tells.unit_style[position].tolist(),
            int(tells.num_sentences[position]),
            settings.words_per_value,
        )
        image = draw_image(
            np.random.default_rng(stream_seed(seed, "world", "image", number)),
            subject if tells.image_subject[position] else None,
            style if tells.image_style[position] else None,
            settings.image_size,
        )
        created = int((LOG_START + hidden.created[position]) * 1_000_000)
        rows.append({"note_id": note_id(number), **text._asdict(), "image": image, "created_at": created})
    return rows


def raw_events(settings: WorldSettings, seed: int, users: np.ndarray) -> pa.Table:
    """Raw rows of all views and clicks of the users numbered ``users`` (U,), by user and time.

    A broken row names a note that does not exist, or has no time or no user.
    """
    shown = impressions(settings, seed, users)
    clicks = np.flatnonzero(~np.isnan(shown.clicked_after))
    row = np.concatenate([np.arange(len(shown.note)), clicks])
    seconds = shown.seconds[row] + np.concatenate([np.zeros(len(shown.note)), shown.clicked_after[clicks]])
    is_click = np.arange(len(row)) >= len(shown.note)
    order = np.lexsort((is_click, seconds, shown.user[row]))
    return _event_table(settings, seed, shown, row[order], is_click[order], seconds[order])


def _event_table(
    settings: WorldSettings, seed: int, shown: Impressions, row: np.ndarray, is_click: np.ndarray, seconds: np.ndarray
) -> pa.Table:
    place = shown.place[row] * 2 + is_click
    broken = uniforms(seed, "event broken", place) < settings.broken_share
    kind = np.where(broken, choices(seed, "event breakage", place, 3), -1)
    note = np.where(kind == 0, settings.num_notes + shown.note[row], shown.note[row])
    users, visits = shown.user[row].tolist(), shown.visit[row].tolist()
    user_ids = np.array([user_id(user) for user in users], dtype=object)
    return pa.table(
        {
            "user_id": pa.array(user_ids, pa.string(), mask=kind == 2),
            "note_id": pa.array([note_id(number) for number in note.tolist()], pa.string()),
            "timestamp": pa.array(((LOG_START + seconds) * 1e6).astype(np.int64), pa.int64(), mask=kind == 1).cast(
                _TIME
            ),
            "action": pa.array(np.where(is_click, "click", "view")),
            "session_id": [f"{user_id(user)}-{visit}" for user, visit in zip(users, visits, strict=True)],
            "_source": [f"world/events:{number}" for number in place.tolist()],
        }
    )


def captions(settings: WorldSettings, seed: int, count: int, start: int = 0) -> Iterator[tuple[bytes, str]]:
    """``count`` pictures with captions that name colours and pattern, to train a small CLIP with.

    They are drawn independently of the notes: none of the world's images is among them, and they say nothing about the
    notes' texts. One in ten shows no pattern, and one in ten no colours, as is possible for the notes' images.

    Args:
        start: number of the first picture; each depends on the seed and its number only.
    """
    words = lexicon(settings.language)
    for number in range(start, start + count):
        rng = random.Random(stream_seed(seed, "world", "caption", number))
        subject = rng.randrange(settings.num_subjects) if rng.random() < 0.9 else None
        style = rng.randrange(settings.num_styles) if rng.random() < 0.9 else None
        # One wording per content: the same content in other words would be a false negative of the contrastive loss.
        wording = ((subject or 0) + (style or 0)) % len(words.captions)
        caption = words.captions[wording].format(
            pattern=words.no_pattern if subject is None else words.patterns[subject],
            palette=words.no_palette if style is None else words.palettes[style],
        )
        image = draw_image(np.random.default_rng(rng.getrandbits(63)), subject, style, settings.image_size)
        yield image, caption


def world_truth(settings: WorldSettings, seed: int) -> pa.Table:
    """The hidden factors of every note that is not broken, and whether its text and its image tell them.

    Returns:
        note_id, subject, style (int64), text_tells_subject, text_tells_style, image_shows_subject, image_shows_style.
    """
    return pa.concat_tables(
        _truth(settings, seed, np.arange(start, min(start + 10_000, settings.num_notes)))
        for start in range(0, settings.num_notes, 10_000)
    )


def _truth(settings: WorldSettings, seed: int, index: np.ndarray) -> pa.Table:
    hidden, tells = traits(settings, seed, index), telling(settings, seed, index)
    table = pa.table(
        {
            "note_id": [note_id(number) for number in index.tolist()],
            "subject": hidden.subject,
            "style": hidden.style,
            "text_tells_subject": tells.unit_subject.any(axis=1),
            "text_tells_style": tells.unit_style.any(axis=1),
            "image_shows_subject": tells.image_subject,
            "image_shows_style": tells.image_style,
        }
    )
    return table.filter(pa.array(hidden.healthy))


def note_id(number: int) -> str:
    """Id of the note numbered ``number``."""
    return f"n{number:07d}"


def user_id(number: int) -> str:
    """Id of the user numbered ``number``."""
    return f"u{number:06d}"


SOURCE = Source(settings=WorldSettings, read=world_tables, versions=lambda settings: {})  # it has no files to watch
