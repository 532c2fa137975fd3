"""From the prepared tables to the recommender's: sequences, blocks, examples and candidates.

What an example may know:

- A user is on one side only: training, validation or test. With ``candidates.split_by=users`` the sides overlap in
  time, as in the paper: other users' later events count in the popularity, and training targets may be later than test
  targets. With ``split_by=time``, training knows nothing from the first validation target on: it is in no history, in
  no popularity, and no note from then on is a negative.
- ``popularity.parquet`` counts users per note, without the last event of every validation and test user. By time, it
  counts only events before the first validation target.
- Negatives are drawn without replacement. They are never notes that the user liked, at whatever time, including events
  that ``sequences.max_events`` leaves out. Where notes have created_at, a negative existed at the target's time. The
  target did, so a later note could be told apart by its date, which a model may infer from text or image. A note
  without created_at is taken to exist always; by time, a note that was first liked in the validation or the test period
  exists from the beginning of that period on.
- ``uniform`` negatives are equally likely. ``popular`` ones are drawn in proportion to clicks + 0.1, with the clicks of
  ``popularity.parquet``. The clicks that make a negative likely are counted there, while the target's own click is held
  out. Where notes have few clicks, a ranking by clicks therefore falls below an AUC of .5 (.39 on the sample of
  MicroLens, with three clicks a note).
- ``published`` is the published construction, for comparison. It leaks popularity: see
  :func:`~notellm2_ray.data.sequences.targets.published_histories`. Its negatives are uniform over all notes, whenever
  they were created.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.schema import QUARANTINE_SCHEMA
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings
from notellm2_ray.data import event_log
from notellm2_ray.data.keys import read_notes, report_ties
from notellm2_ray.data.sequences.events import (
    GROUPED_SCHEMA,
    POSITIVE_EVENT_SCHEMA,
    build_histories,
    group_events,
    log_direction,
    positive_events,
)
from notellm2_ray.data.sequences.histories import HISTORY_SCHEMA, Histories, k_core, within_core
from notellm2_ray.data.sequences.leaks import check_tables
from notellm2_ray.data.sequences.note_facts import EVER, NoteFacts, note_facts
from notellm2_ray.data.sequences.part_tables import PartTables, table_names
from notellm2_ray.data.sequences.shortages import check_actions, check_negatives
from notellm2_ray.data.sequences.split import UserSplit, fit_split
from notellm2_ray.data.sequences.statistics import format_statistics, sequence_statistics
from notellm2_ray.data.tasks import read_arrow, run_here, run_on_ray, write_arrow
from notellm2_ray.data.writer import RollingWriter, write_parquet

PARTITION_EVENTS = 1 << 19
_SCRATCH = ".sequences-"
TIES_FOLLOW = {1: "the log", -1: "the log, which is newest first", 0: "a hash, because the log's rows are not by time"}
log = logging.getLogger("notellm2_ray")

POPULARITY_SCHEMA = pa.schema(
    [pa.field("note_id", pa.string(), nullable=False), pa.field("clicks", pa.int64(), nullable=False)]
)


@dataclass(frozen=True)
class _Shared:
    """What all tasks share; small, because it is sent with each."""

    scratch: Path
    units: tuple[list[event_log.RowGroup], ...]
    partitions: int
    sequences: SequenceSettings
    candidates: CandidateSettings
    seed: int
    draws: int
    direction: int = 0
    split: UserSplit | None = None


def make_sequences(
    prepared: Path,
    output: Path,
    sequences: SequenceSettings,
    candidates: CandidateSettings,
    seed: int,
    *,
    draws: int | None = None,
    partitions: int = 0,
) -> dict[str, Any]:
    """Write the recommender's tables into ``output``; Ray must be connected unless there is only one part.

    The files are sequences.parquet, blocks.parquet (of users with an example), train/valid/test.parquet,
    candidates/{train,valid}.parquet and one for each of ``candidates.protocols``, popularity.parquet, note_ids.parquet
    (all notes that may be a candidate), statistics.json and quarantine/. With the protocol ``published`` there are also
    published.parquet, published_blocks.parquet and published_popularity.parquet. Each file appears complete or not at
    all. The same input gives the same files for any number of ``partitions`` of the users (0: by the log's length).
    Users are ordered by their keys (see :mod:`notellm2_ray.data.sequences.events`), so that the first n are a random
    sample. Under other ids of users and notes the tables are the same but for the ids.

    Args:
        seed: of the split and of the users that are tested.
        draws: seed of the negatives; None: ``seed``.

    Returns:
        counts for the manifest.

    Raises:
        DataError: there are no positive events, too few users, or too few notes to draw negatives from.
    """
    groups = event_log.list_row_groups(event_log.parquet_files(prepared / "events"))
    notes = read_notes(prepared)
    units = event_log.plan_units(groups, EVER, -EVER)
    partitions = partitions or -(-sum(group.rows for group in groups) // PARTITION_EVENTS) or 1
    run = run_here if partitions == 1 else run_on_ray
    for stale in output.glob(f"{_SCRATCH}*"):  # from a run that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=output) as scratch:
        shared = _Shared(
            Path(scratch), tuple(units), partitions, sequences, candidates, seed, seed if draws is None else draws
        )
        write_arrow(shared.scratch / "notes.arrow", notes.to_batches(), notes.schema)
        read = list(run(_read_unit, len(units), shared, "make-sequences", "units of events read"))
        check_actions(read, sequences)
        grouped = run(_group_part, partitions, shared, "make-sequences", "parts of the users gathered")
        direction = log_direction(sum((part["steps"] for part in grouped), np.zeros(2, np.int64)))
        shared = replace(shared, direction=direction)
        list(run(_build_part, partitions, shared, "make-sequences", "parts of the users sorted"))
        in_core = _core(shared, notes.num_rows)
        shared = replace(shared, split=_split(shared, in_core))
        _write_facts(shared, in_core, _created(notes))
        counts = list(run(_make_part, partitions, shared, "make-sequences", "parts of the users written"))
        check_negatives(counts, candidates)
        _write_tables(shared, output)
        _write_notes(shared, output, counts)
        _write_quarantine(shared, output)
    assert shared.split is not None
    statistics = sequence_statistics(
        counts, read, num_notes=int(in_core.sum()), split=shared.split, settings=candidates
    )
    statistics["ties_follow"] = TIES_FOLLOW[direction]
    write_atomically(output / "statistics.json", json.dumps(statistics, indent=2))
    log.info("statistics of the sequences:\n%s", format_statistics(statistics))
    _report_ties(statistics)
    numbers = {name: value for name, value in statistics.items() if isinstance(value, int)}
    return numbers | {"ties_follow": statistics["ties_follow"], "partitions": partitions}


def _report_ties(statistics: Mapping[str, Any]) -> None:
    order = f"ordered by {statistics['ties_follow']}"
    kept = statistics["interactions"] - statistics["truncated_events"]
    report_ties(f"likes at the same time as another of their user, {order}", statistics["tied_events"], kept)
    targets = statistics["users"] - statistics["cold_users"]
    report_ties(f"targets at the same time as the like before, {order}", statistics["tied_targets"], targets)


def _read_unit(shared: _Shared, index: int) -> dict[str, Any]:
    actions = shared.sequences.positive_actions
    batches, bad, seen = positive_events(shared.units[index], _vocabulary(shared), actions, shared.partitions)
    write_arrow(shared.scratch / f"unit-{index}.arrow", batches, POSITIVE_EVENT_SCHEMA)
    write_arrow(shared.scratch / f"quarantine-unit-{index}.arrow", bad.to_batches(), QUARANTINE_SCHEMA)
    return {"actions": json.dumps(seen), "unknown_note_events": bad.num_rows}


def _group_part(shared: _Shared, index: int) -> dict[str, Any]:
    units = range(len(shared.units))
    events = (read_arrow(shared.scratch / f"unit-{unit}.arrow").get_batch(index) for unit in units)
    batches, steps = group_events(events, _note_keys(shared), shared.partitions)
    write_arrow(shared.scratch / f"grouped-{index}.arrow", batches, GROUPED_SCHEMA)
    return {"steps": steps}


def _build_part(shared: _Shared, index: int) -> dict[str, Any]:
    parts = (read_arrow(shared.scratch / f"grouped-{part}.arrow").get_batch(index) for part in range(shared.partitions))
    histories = build_histories(parts, _note_keys(shared), shared.direction)
    write_arrow(shared.scratch / f"histories-{index}.arrow", [histories.to_batch()], HISTORY_SCHEMA)
    return {"users": len(histories.users)}


def _make_part(shared: _Shared, index: int) -> dict[str, Any]:
    assert shared.split is not None
    notes = _facts(shared)
    histories = _part(shared, index, notes.in_core)
    settings = shared.sequences, shared.candidates
    made = PartTables(histories, _vocabulary(shared), notes, shared.split, *settings, shared.draws)
    for name, table in made.tables.items():
        write_arrow(shared.scratch / f"{name}-{index}.arrow", table.to_batches(), table.schema)
    return made.counts


def _part(shared: _Shared, index: int, in_core: np.ndarray) -> Histories:
    histories = Histories.from_batch(read_arrow(shared.scratch / f"histories-{index}.arrow").get_batch(0))
    k = shared.candidates.k_core
    return within_core(histories, in_core, k[0]) if k else histories


def _parts(shared: _Shared, in_core: np.ndarray) -> Iterator[Histories]:
    return (_part(shared, index, in_core) for index in range(shared.partitions))


def _core(shared: _Shared, num_notes: int) -> np.ndarray:
    everything = np.ones(num_notes, bool)
    if shared.candidates.k_core is None:
        return everything
    whole = replace(shared, candidates=shared.candidates.model_copy(update={"k_core": None}))
    in_core = k_core(lambda: _parts(whole, everything), num_notes, *shared.candidates.k_core)
    if not in_core.any():
        raise DataError(f"candidates.k_core={list(shared.candidates.k_core)} leaves no note: lower its numbers")
    return in_core


def _split(shared: _Shared, in_core: np.ndarray) -> UserSplit:
    def with_target() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in _parts(shared, in_core):
            has = part.lengths >= shared.sequences.min_events
            yield part.keys[has], part.times[part.offsets[1:] - 1][has]

    return fit_split(with_target(), shared.candidates, shared.seed)


def _write_facts(shared: _Shared, in_core: np.ndarray, created: np.ndarray) -> None:
    assert shared.split is not None
    facts = note_facts(
        _parts(shared, in_core),
        shared.split,
        min_events=shared.sequences.min_events,
        created=created,
        in_core=in_core,
        existing_notes_only=shared.candidates.existing_notes_only,
    ).to_table()
    write_arrow(shared.scratch / "facts.arrow", facts.to_batches(), facts.schema)


def _facts(shared: _Shared) -> NoteFacts:
    return NoteFacts.from_table(read_arrow(shared.scratch / "facts.arrow").read_all())


def _write_tables(shared: _Shared, output: Path) -> None:
    """One file of all parts for each table, once no example of any part gives its answer away."""
    names = table_names(shared.candidates.protocols)
    for index in range(shared.partitions):
        check_tables({name: _table(shared, name, index) for name in names}, shared.candidates)
    for name in names:
        path = output / f"{name.replace('candidates-', 'candidates/')}.parquet"
        write_parquet(path, (_table(shared, name, index) for index in range(shared.partitions)))


def _write_notes(shared: _Shared, output: Path, counts: Sequence[dict[str, Any]]) -> None:
    notes = _facts(shared)
    ids = _vocabulary(shared).filter(pa.array(notes.in_core))

    def write(name: str, clicks: np.ndarray) -> None:
        table = pa.table([ids, pa.array(clicks[notes.in_core])], schema=POPULARITY_SCHEMA)
        write_parquet(output / f"{name}.parquet", [table])

    write_parquet(output / "note_ids.parquet", [pa.table({"note_id": ids})])
    write("popularity", notes.clicks)
    if "published" in shared.candidates.protocols:
        targets = np.concatenate([np.asarray(part["published_targets"], np.int64) for part in counts])
        write("published_popularity", notes.every_click - np.bincount(targets, minlength=len(notes.in_core)))


def _write_quarantine(shared: _Shared, output: Path) -> None:
    shutil.rmtree(output / "quarantine", ignore_errors=True)
    with RollingWriter(output / "quarantine", "sequences", QUARANTINE_SCHEMA, rows_per_file=1_000_000) as writer:
        names = [f"unit-{index}" for index in range(len(shared.units))] + [str(p) for p in range(shared.partitions)]
        for name in names:
            writer.write(read_arrow(shared.scratch / f"quarantine-{name}.arrow").read_all())


def _created(notes: pa.Table) -> np.ndarray:
    """(number of notes,) int64, creation times in microseconds, EVER where unknown."""
    return notes["created_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).fill_null(EVER).to_numpy()


def _table(shared: _Shared, name: str, index: int) -> pa.Table:
    return read_arrow(shared.scratch / f"{name}-{index}.arrow").read_all()


def _vocabulary(shared: _Shared) -> pa.Array:
    return read_arrow(shared.scratch / "notes.arrow").read_all().column("note_id").combine_chunks()


def _note_keys(shared: _Shared) -> np.ndarray:
    return read_arrow(shared.scratch / "notes.arrow").read_all().column("key").to_numpy()
