"""From prepared notes and events to the pairs that train, validate and test an embedder."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.schema import NEGATIVES, NOTE_SCHEMA, require_columns
from notellm2_ray.core.settings import PairSettings, SplitSettings
from notellm2_ray.data import event_log
from notellm2_ray.data.keys import read_notes
from notellm2_ray.data.pairs.own import own_pairs
from notellm2_ray.data.pairs.related import MinedPairs, mine_pairs
from notellm2_ray.data.pairs.split import Split, split_notes, split_pairs
from notellm2_ray.data.pairs.statistics import describe_notes, format_statistics

FEW_TEST_PAIRS = 100  # with fewer, one pair moves a recall by more than a point
_SCRATCH = ".mine-"
log = logging.getLogger("notellm2_ray")

POPULARITY_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("clicks", pa.int64(), nullable=False),
        # True for notes of the test pool: counted over the events that the test pairs were mined from.
        pa.field("optimistic", pa.bool_(), nullable=False),
        # Clicks in the log that the training pairs were mined from; 0 for a note that training does not know.
        pa.field("train_clicks", pa.int64(), nullable=False),
    ]
)


def mine(prepared: Path, output: Path, pairs: PairSettings, split: SplitSettings, seed: int) -> dict[str, Any]:
    """Mine, split and describe the pairs of related notes (NoteLLM-2, Eq. 2, section 2.3 and Table 1).

    With ``pairs.table`` the pairs are read instead (:mod:`notellm2_ray.data.pairs.own`).

    Writes into ``output``: train.parquet, valid.parquet and test.parquet (PAIR_SCHEMA, sorted by query and descending
    score; the first two of one's own pairs have ``negatives`` too), test_pool.parquet (note_id: all test notes),
    train_notes.arrow (a NoteStore of the notes of training and validation pairs, and of their negatives),
    popularity.parquet, train_log.json (``start`` and ``end`` of the log that the training pairs were mined from, in
    microseconds since 1970, end exclusive) and statistics.json. Notes stand in the order of their keys
    (:mod:`notellm2_ray.data.keys`), and no result depends on their names.

    ``popularity.parquet`` has the number of users who clicked each note within the log that its side is mined from. For
    notes of the test pool this is the test log, because notes created after the boundary have no other. A ranking by it
    has seen the clicks that it must predict; the column ``optimistic`` marks these rows. In production popularity would
    know less, so this favours the popularity baseline, never the embedder.

    Returns:
        counts for the manifest.

    Raises:
        DataError: notes or events are missing or unusable, or one side has no pair.
    """
    groups = event_log.list_row_groups(event_log.parquet_files(prepared / "events"))
    notes = ds.dataset([str(path) for path in event_log.parquet_files(prepared / "notes")], format="parquet")
    require_columns(notes.schema, NOTE_SCHEMA, str(prepared / "notes"))
    span = event_log.log_span(groups)
    parted = split_notes(read_notes(prepared), span, split, window_days=pairs.window_days, seed=seed)
    if pairs.table is None:
        train_mined, test_mined = _mine_both(groups, parted, pairs, output)
    else:
        train_mined, test_mined = own_pairs(prepared, parted, pairs)
    train, valid = split_pairs(train_mined.pairs, split.valid_share, seed)
    _check_test(test_mined.pairs.num_rows)

    for name, table in (("train", train), ("valid", valid), ("test", test_mined.pairs)):
        pq.write_table(table, output / f"{name}.parquet")
    pool = parted.notes.filter(pa.array(parted.in_pool))
    pq.write_table(pa.table({"note_id": pool}), output / "test_pool.parquet")
    pq.write_table(_popularity(parted, train_mined, test_mined), output / "popularity.parquet")
    start, end = parted.train_window
    write_atomically(output / "train_log.json", json.dumps({"start": start, "end": end}))
    trained = pc.unique(pa.chunked_array([*(train_mined.pairs.column(c).combine_chunks() for c in (0, 1))]))
    num_stored = _store(notes, _with_negatives(trained, train_mined.pairs), output / "train_notes.arrow")

    texts = ["title", "topics", "content"]
    statistics = {
        "training": describe_notes(_stream(notes, trained, texts), train_mined.pairs.num_rows) | train_mined.ties,
        "testing": describe_notes(_stream(notes, pool, texts), test_mined.pairs.num_rows) | test_mined.ties,
    }
    write_atomically(output / "statistics.json", json.dumps(statistics, indent=2))
    log.info("statistics of the pairs (validation pairs count as training):\n%s", format_statistics(statistics))
    return {
        "notes": len(parted.notes),
        "train_notes": num_stored,
        "test_pool": len(pool),
        "train_pairs": train.num_rows,
        "valid_pairs": valid.num_rows,
        "test_pairs": test_mined.pairs.num_rows,
        "boundary": None if parted.boundary is None else str(np.datetime64(parted.boundary, "us")),
        "train_log": train_mined.counts,
        "test_log": test_mined.counts,
    }


def _mine_both(
    groups: list[event_log.RowGroup], parted: Split, settings: PairSettings, output: Path
) -> tuple[MinedPairs, MinedPairs]:
    """Training pairs from the events on training notes only; test pairs from all events of the test log.

    N_u describes a user's behaviour, so in the test log it includes clicks on older notes. In training, events on test
    notes are left out. In a split by time there are none before the boundary, unless the source is wrong.
    """
    for stale in output.glob(f"{_SCRATCH}*"):  # from a run that was killed
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=output) as scratch:
        train_dir, test_dir = Path(scratch, "train"), Path(scratch, "test")
        train_dir.mkdir()
        test_dir.mkdir()
        known, keys = parted.notes.filter(pa.array(~parted.is_test)), parted.keys[~parted.is_test]
        start, end = parted.train_window
        train = mine_pairs(
            groups, known, keys, settings, start=start, end=end, scratch=train_dir, what="training pairs"
        )
        start, end = parted.test_window
        test = mine_pairs(
            groups,
            parted.notes,
            parted.keys,
            settings,
            start=start,
            end=end,
            scratch=test_dir,
            pairable=parted.in_pool,
            what="test pairs",
        )
    return train, test


def _popularity(parted: Split, train: MinedPairs, test: MinedPairs) -> pa.Table:
    train_clicks = np.zeros_like(test.clicks)
    train_clicks[~parted.is_test] = train.clicks
    clicks = np.where(parted.in_pool, test.clicks, train_clicks)
    columns = [parted.notes, *map(pa.array, (clicks, parted.in_pool, train_clicks))]
    return pa.table(columns, schema=POPULARITY_SCHEMA)


def _check_test(num_pairs: int) -> None:
    if num_pairs < FEW_TEST_PAIRS:
        log.warning(
            "only %d test pairs: one pair moves a recall by %.1f points; raise split.test_share or give a longer log",
            num_pairs,
            100 / num_pairs,
        )


def _with_negatives(notes: pa.Array, pairs: pa.Table) -> pa.Array:
    """The notes of the pairs, and the negatives of one's own pairs after them."""
    if NEGATIVES not in pairs.column_names:
        return notes
    negatives = pc.list_flatten(pairs[NEGATIVES]).combine_chunks()
    return pc.unique(pa.chunked_array([notes, negatives]))


def _store(notes: ds.Dataset, wanted: pa.Array, path: Path) -> int:
    """Write a NoteStore of the wanted notes in their order, on which what the tiny models are taught depends."""
    unordered = path.with_name(f"{_SCRATCH}{path.name}")
    NoteStore.write(unordered, _stream(notes, wanted, NOTE_SCHEMA.names))
    count = NoteStore.write(path, NoteStore(unordered).batches(wanted.to_pylist()))
    unordered.unlink()
    return count


def _stream(notes: ds.Dataset, wanted: pa.Array | pa.ChunkedArray, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The wanted notes, a few at a time, so that few images are read ahead."""
    yield from notes.to_batches(
        columns=columns,
        filter=pc.field("note_id").isin(wanted),
        batch_size=256,
        batch_readahead=1,
        fragment_readahead=1,
    )
