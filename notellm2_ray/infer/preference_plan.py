"""Which preferences to make: each user's blocks as a chain of steps, each step with a key of all it depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.recommend_prompts import Item
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.schema import BLOCK_SCHEMA, NOTE_SCHEMA, SUMMARY_SCHEMA, require_columns
from notellm2_ray.core.settings import PreferenceSettings
from notellm2_ray.infer.preference_steps import shorten

_NEEDED = pa.schema([BLOCK_SCHEMA.field("user_id"), BLOCK_SCHEMA.field("block")])
_TITLES = pa.schema([NOTE_SCHEMA.field("note_id"), NOTE_SCHEMA.field("title")])


class ChainStep(NamedTuple):
    """One call of the model: the preference after block ``block`` of a user."""

    block: int
    key: str  # hash of the model, the settings and all items that the preference is made of, back to block 0
    items: list[Item]  # of the block; for the variant ``direct`` of the whole history


class Chain(NamedTuple):
    """Steps of one user, each building on the one before; for ``direct`` a single step."""

    user: str
    steps: list[ChainStep]


class ChainPlan(NamedTuple):
    """All chains of a job."""

    chains: list[Chain]
    users: int
    missing_notes: Counter[str]  # note ids in histories but in no notes table, and how often they occur
    without_summary: int  # items shown by their title alone although summaries were given


def plan_chains(
    blocks: Path | str,
    titles: Mapping[str, str],
    summaries: Mapping[str, str] | None,
    settings: PreferenceSettings,
    made_by: str,
    needed: Path | str | None = None,
) -> ChainPlan:
    """Cut the histories into chains.

    Args:
        blocks: Parquet of ``BLOCK_SCHEMA``.
        titles, summaries: of notes, by id; summaries are not used for ``no_image_summary``.
        made_by: fingerprint of the model and the settings; it is part of every key.
        needed: Parquet with ``user_id`` and ``block``: the preferences that later stages read. A chain then ends at
            its user's last needed block, and ``direct`` makes only the needed ones. Without it: all blocks, and for
            ``direct`` each user's last.

    Raises:
        DataError: a file is unusable, a user's blocks are not numbered 0, 1, 2, ..., or a needed block does not exist.
    """
    wanted = None if needed is None else _needed(needed)
    summaries = None if settings.variant == "no_image_summary" else summaries
    chains: list[Chain] = []
    missing: Counter[str] = Counter()
    users = without = 0
    for user, history in _histories(blocks):
        users += 1
        asked = _asked(user, len(history), wanted, settings.variant)
        if not asked:
            continue
        shown: list[list[Item]] = []
        for note_ids in history[: max(asked) + 1]:
            missing.update(note_id for note_id in note_ids if note_id not in titles)
            known = [note_id for note_id in note_ids if note_id in titles]
            items = [Item(titles[note_id], summaries.get(note_id) if summaries else None) for note_id in known]
            without += 0 if summaries is None else sum(item.image_summary is None for item in items)
            shown.append(list(shorten(items, settings)))
        chains += _chains(user, shown, asked, settings.variant, made_by)
    if wanted:
        some = next(iter(wanted))
        raise DataError(
            f"{needed}: {len(wanted)} user(s), such as {some!r}, have no history in {blocks}: run make-sequences again"
        )
    return ChainPlan(chains, users, missing, without)


def read_titles(notes: Path | str) -> dict[str, str]:
    """Title by note id, from prepared notes (a Parquet file or a directory of them)."""
    table = _read(notes, _TITLES)
    return dict(zip(table.column("note_id").to_pylist(), table.column("title").to_pylist(), strict=True))


def read_summaries(path: Path | str) -> dict[str, str]:
    """Image summary by note id."""
    table = _read(path, SUMMARY_SCHEMA)
    return dict(zip(table.column("note_id").to_pylist(), table.column("summary").to_pylist(), strict=True))


def _chains(
    user: str, shown: Sequence[list[Item]], asked: Sequence[int], variant: str, made_by: str
) -> Iterator[Chain]:
    key = fingerprint(made_by, user)
    steps = []
    for block, items in enumerate(shown):
        key = fingerprint(key, block, items)
        steps.append(ChainStep(block, key, items))
    if variant != "direct":
        yield Chain(user, steps)
        return
    for block in asked:
        items = [item for step in steps[: block + 1] for item in step.items]
        yield Chain(user, [ChainStep(block, steps[block].key, items)])


def _asked(user: str, blocks: int, wanted: dict[str, list[int]] | None, variant: str) -> list[int]:
    """Blocks of a user whose preferences are needed."""
    if wanted is None:
        return [blocks - 1] if variant == "direct" else list(range(blocks))
    asked = wanted.pop(user, [])
    if asked and asked[-1] >= blocks:
        raise DataError(f"user {user!r} has {blocks} block(s), but the preference after block {asked[-1]} is needed")
    return asked


def _needed(path: Path | str) -> dict[str, list[int]]:
    table = _read(path, _NEEDED)
    wanted: dict[str, set[int]] = {}
    for user, block in zip(table.column("user_id").to_pylist(), table.column("block").to_pylist(), strict=True):
        if block >= 0:  # -1: no history, so no preference
            wanted.setdefault(user, set()).add(block)
    return {user: sorted(blocks) for user, blocks in wanted.items()}


def _histories(path: Path | str) -> Iterator[tuple[str, list[list[str]]]]:
    """Each user with the note ids of the user's blocks."""
    table = _read(path, BLOCK_SCHEMA)
    table = table.take(pc.sort_indices(table, sort_keys=[("user_id", "ascending"), ("block", "ascending")]))
    user: str | None = None
    history: list[list[str]] = []
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            if row["user_id"] != user:
                if history:
                    yield str(user), history
                user, history = row["user_id"], []
            if row["block"] != len(history):
                raise DataError(
                    f"{path}: user {user!r} has block {row['block']} where block {len(history)} must be. Blocks are "
                    "numbered 0, 1, 2, ... without a gap: run make-sequences again"
                )
            history.append(row["note_ids"])
    if history:
        yield str(user), history


def _read(path: Path | str, needed: pa.Schema) -> pa.Table:
    try:
        # The schema is checked first, for an error that names the column.
        require_columns(pq.ParquetDataset(path).schema, needed, str(path))
        return pq.read_table(path, columns=needed.names).cast(needed)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read as a Parquet table: {error}") from error


def plan_counts(plan: ChainPlan) -> dict[str, Any]:
    """Counts for the manifest."""
    return {
        "users": plan.users,
        "preferences": sum(len(chain.steps) for chain in plan.chains),
        "missing_notes": len(plan.missing_notes),
        "items_without_summary": plan.without_summary,
    }
