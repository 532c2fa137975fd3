"""Who is trained and tested on what: from the prepared tables to sequences, blocks, examples and candidates.

What may know what:

- A user is on one side only. By users the sides overlap in time, as in the paper: others' later events count in the
  popularity, and training targets may be later than test targets. By time they do not: training knows nothing from
  the first validation target's moment on, neither as history, nor as popularity, nor as a note to draw negatives from.
- ``popularity.parquet`` counts users per note, without the last event of any validation or test user; by time only
  events before the first validation target.
- Negatives are drawn without replacement and are never notes that the user liked, be it earlier, later or before what
  ``sequences.max_events`` keeps. Where notes carry created_at, only those that existed at the target's time are drawn:
  the target existed, so that a later note could be told from it by its date, which a model may read off words or
  looks. A note without created_at counts as existing; by time, from the first side on in whose period, or before,
  somebody liked it.
- ``uniform`` negatives are all equally likely; ``popular`` ones by clicks + 0.1, clicks as in ``popularity.parquet``.
  The latter are ahead of the targets by the very click that drew them, so that where notes have few clicks, ranking by
  clicks alone falls below an AUC of .5 (.39 on the sample of MicroLens, which has three clicks a note).
- ``published`` is the published construction, rebuilt to be compared with. It leaks popularity: see
  :func:`targets.published_histories`. Its negatives are uniform over all notes, whenever they were created.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.schema import NOTE_SCHEMA, QUARANTINE_SCHEMA, require_columns
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings
from notellm2_ray.data import event_log
from notellm2_ray.data.sequences.blocks import SPILLED_SCHEMA, build_histories, spill_unit
from notellm2_ray.data.sequences.checks import check_actions, check_short, check_tables
from notellm2_ray.data.sequences.example_files import (
    EVER,
    POPULARITY_SCHEMA,
    NoteFacts,
    PartWriter,
    table_names,
    write_parquet,
)
from notellm2_ray.data.sequences.histories import HISTORY_SCHEMA, Histories, k_core, within_core
from notellm2_ray.data.sequences.statistics import format_statistics, summarise
from notellm2_ray.data.sequences.targets import TargetSplit, fit_split
from notellm2_ray.data.tasks import read_arrow, run_here, run_on_ray, write_arrow
from notellm2_ray.data.writer import RollingWriter

PARTITION_EVENTS = 1 << 19
_SCRATCH = ".sequences-"
_log = logging.getLogger("notellm2_ray")


@dataclass(frozen=True)
class _Job:
    """What every task needs; small, as it travels with each."""

    scratch: Path
    units: tuple[list[event_log.RowGroup], ...]
    partitions: int
    sequences: SequenceSettings
    candidates: CandidateSettings
    seed: int
    split: TargetSplit | None = None


def make_sequences(
    prepared: Path,
    output: Path,
    sequences: SequenceSettings,
    candidates: CandidateSettings,
    seed: int,
    *,
    partitions: int = 0,
) -> dict[str, Any]:
    """Write the recommender's tables into ``output``; Ray must be connected unless one part is enough.

    sequences.parquet, blocks.parquet (of users that have an example), train/valid/test.parquet,
    candidates/{train,valid}.parquet and one for each of ``candidates.protocols``, popularity.parquet,
    note_ids.parquet (all that may be a candidate), statistics.json, quarantine/; with the protocol ``published`` also
    published.parquet, published_blocks.parquet and published_popularity.parquet. Each file appears whole. The same
    input gives the same files, however many ``partitions`` (0: by the log's length) the users are hashed into; users
    stand in the order of a hash of their ids, so that the first n are a random sample.

    Returns:
        counts for the manifest.

    Raises:
        DataError: no positive event, too few users, or too few notes to draw negatives from.
    """
    groups = event_log.list_row_groups(event_log.parquet_files(prepared / "events"))
    ids, created = _read_notes(prepared / "notes")
    units = event_log.plan_units(groups, EVER, -EVER)
    rows = sum(group.rows for group in groups)
    partitions = partitions or -(-rows // PARTITION_EVENTS) or 1
    run = run_here if partitions == 1 else run_on_ray
    for stale in output.glob(f"{_SCRATCH}*"):  # of a run that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=output) as scratch:
        job = _Job(Path(scratch), tuple(units), partitions, sequences, candidates, seed)
        write_arrow(job.scratch / "notes.arrow", ids.to_batches(), ids.schema)
        spilt = list(run(_spill, len(units), job, "sequences: units of events read"))
        check_actions(spilt, sequences)
        list(run(_build, partitions, job, "sequences: parts of the users sorted"))
        alive = _core(job, ids.num_rows)
        split = _split(job, alive)
        job = replace(job, split=split)
        _write_pool(job, alive, created)
        answers = list(run(_write_part, partitions, job, "sequences: parts of the users written"))
        check_short(answers, candidates)
        names = table_names(candidates.protocols)
        for index in range(partitions):
            check_tables({name: _read(job, name, index) for name in names}, candidates)
        for name in names:
            path = output / f"{name.replace('candidates-', 'candidates/')}.parquet"
            write_parquet(path, (_read(job, name, index) for index in range(partitions)))
        _write_notes(job, output, answers)
        _write_quarantine(job, output)
        statistics = summarise(answers, spilt, num_notes=int(alive.sum()), split=split, settings=candidates)
    write_atomically(output / "statistics.json", json.dumps(statistics, indent=2))
    _log.info("statistics of the sequences:\n%s", format_statistics(statistics))
    return {name: value for name, value in statistics.items() if isinstance(value, int)} | {"partitions": partitions}


def _spill(job: _Job, index: int) -> dict[str, Any]:
    vocabulary = _vocabulary(job)
    batches, bad, seen = spill_unit(job.units[index], vocabulary, job.sequences.positive_actions, job.partitions)
    write_arrow(job.scratch / f"unit-{index}.arrow", batches, SPILLED_SCHEMA)
    write_arrow(job.scratch / f"quarantine-unit-{index}.arrow", bad.to_batches(), QUARANTINE_SCHEMA)
    return {"actions": json.dumps(seen), "unknown_note_events": bad.num_rows}


def _build(job: _Job, index: int) -> dict[str, Any]:
    units = range(len(job.units))
    histories = build_histories(read_arrow(job.scratch / f"unit-{unit}.arrow").get_batch(index) for unit in units)
    write_arrow(job.scratch / f"histories-{index}.arrow", [histories.to_batch()], HISTORY_SCHEMA)
    return {"users": len(histories.users)}


def _write_part(job: _Job, index: int) -> dict[str, Any]:
    assert job.split is not None
    notes = _facts(job)
    writer = PartWriter(_vocabulary(job), notes, job.split, job.sequences, job.candidates, job.seed)
    tables, answer = writer.write(_load(job, index, notes.alive))
    for name, table in tables.items():
        write_arrow(job.scratch / f"{name}-{index}.arrow", table.to_batches(), table.schema)
    return answer


def _load(job: _Job, index: int, alive: np.ndarray) -> Histories:
    histories = Histories.from_batch(read_arrow(job.scratch / f"histories-{index}.arrow").get_batch(0))
    return within_core(histories, alive, job.candidates.k_core[0]) if job.candidates.k_core else histories


def _parts(job: _Job, alive: np.ndarray) -> Iterator[Histories]:
    return (_load(job, index, alive) for index in range(job.partitions))


def _core(job: _Job, num_notes: int) -> np.ndarray:
    everything = np.ones(num_notes, bool)
    if job.candidates.k_core is None:
        return everything
    whole = replace(job, candidates=job.candidates.model_copy(update={"k_core": None}))
    alive = k_core(lambda: _parts(whole, everything), num_notes, *job.candidates.k_core)
    if not alive.any():
        raise DataError(f"candidates.k_core={list(job.candidates.k_core)} leaves no note: lower its numbers")
    return alive


def _split(job: _Job, alive: np.ndarray) -> TargetSplit:
    def with_target() -> Iterator[tuple[pa.Array, np.ndarray]]:
        for part in _parts(job, alive):
            has = part.lengths >= job.sequences.min_events
            yield part.users.filter(pa.array(has)), part.times[part.offsets[1:] - 1][has]

    return fit_split(with_target(), job.candidates, job.seed)


def _write_pool(job: _Job, alive: np.ndarray, created: np.ndarray) -> None:
    """Write the :class:`NoteFacts`."""
    assert job.split is not None
    clicks, every_click = np.zeros(len(alive), np.int64), np.zeros(len(alive), np.int64)
    first_liked = np.full(len(alive), -EVER)
    for part in _parts(job, alive):
        known = job.split.known_events(part, job.sequences.min_events)
        clicks += np.bincount(part.notes[known], minlength=len(alive))
        every_click += np.bincount(part.notes, minlength=len(alive))
        np.minimum.at(first_liked, part.notes, part.times)
    births = np.full(len(alive), EVER)
    if job.split.by_time:
        valid, test = job.split.bounds
        births = np.where(first_liked < valid, EVER, np.where(first_liked < test, valid, test))
    if job.candidates.existing_notes_only:
        births = np.where(created == EVER, births, created)
    columns = NoteFacts(births, clicks, every_click, alive)._asdict()
    table = pa.table({name: pa.array(column) for name, column in columns.items()})
    write_arrow(job.scratch / "facts.arrow", table.to_batches(), table.schema)


def _facts(job: _Job) -> NoteFacts:
    return NoteFacts(*(column.to_numpy() for column in read_arrow(job.scratch / "facts.arrow").read_all().columns))


def _write_notes(job: _Job, output: Path, answers: list[dict[str, Any]]) -> None:
    notes = _facts(job)
    ids = _vocabulary(job).filter(pa.array(notes.alive))

    def write(name: str, clicks: np.ndarray) -> None:
        table = pa.table([ids, pa.array(clicks[notes.alive])], schema=POPULARITY_SCHEMA)
        write_parquet(output / f"{name}.parquet", [table])

    write_parquet(output / "note_ids.parquet", [pa.table({"note_id": ids})])
    write("popularity", notes.clicks)
    if "published" in job.candidates.protocols:
        targets = np.concatenate([np.asarray(answer["published_targets"], np.int64) for answer in answers])
        write("published_popularity", notes.every_click - np.bincount(targets, minlength=len(notes.alive)))


def _write_quarantine(job: _Job, output: Path) -> None:
    shutil.rmtree(output / "quarantine", ignore_errors=True)
    with RollingWriter(output / "quarantine", "sequences", QUARANTINE_SCHEMA, rows_per_file=1_000_000) as writer:
        names = [f"unit-{index}" for index in range(len(job.units))] + [str(p) for p in range(job.partitions)]
        for name in names:
            writer.write(read_arrow(job.scratch / f"quarantine-{name}.arrow").read_all())


def _read_notes(directory: Path) -> tuple[pa.Table, np.ndarray]:
    """Note ids, ascending, as a table, and when each was created in microseconds; EVER where it is not known."""
    notes = ds.dataset([str(path) for path in event_log.parquet_files(directory)], format="parquet")
    require_columns(notes.schema, NOTE_SCHEMA, str(directory))
    table = notes.to_table(columns=["note_id", "created_at"]).sort_by("note_id").combine_chunks()
    created = table["created_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).fill_null(EVER)
    return table.select(["note_id"]), created.to_numpy()


def _read(job: _Job, name: str, index: int) -> pa.Table:
    return read_arrow(job.scratch / f"{name}-{index}.arrow").read_all()


def _vocabulary(job: _Job) -> pa.Array:
    return read_arrow(job.scratch / "notes.arrow").read_all().column("note_id").combine_chunks()
