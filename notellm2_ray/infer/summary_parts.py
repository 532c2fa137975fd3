"""The parts of image summaries: one for each batch that left the engine.

Unlike the parts of other jobs they are not planned. Which notes share a batch depends on the engine, so a part has a
random id, and the ``version`` of each row says what it was made from. A later run describes the notes for which there
is no row of its own versions.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.schema import SUMMARY_SCHEMA
from notellm2_ray.infer.parts import FinishedPart, PartStore, quarantine_table, write_whole_parquet
from notellm2_ray.infer.summary_rows import NO_IMAGE

_VERSION = pa.field("version", pa.string(), nullable=False)  # of the model, prompt, settings and notes file together
_ROWS = SUMMARY_SCHEMA.append(_VERSION)
# In the quarantine: whether the engine failed rather than the image, so that the next run is to ask again.
_PASSING = pa.field("passing", pa.bool_(), nullable=False)


@dataclass(frozen=True, kw_only=True)
class DescribedPart(FinishedPart):
    """A finished part's counts."""

    summaries: int
    quarantined: int


class Described(NamedTuple):
    """Ids of the notes that are finished."""

    summaries: set[str]
    quarantined: set[str]  # the image or the answer was unusable
    without_image: set[str]

    @property
    def ids(self) -> set[str]:
        return self.summaries | self.quarantined | self.without_image


def described_parts(output: Path) -> PartStore[DescribedPart]:
    """The parts of a job: rows of SUMMARY_SCHEMA and ``version``."""
    return PartStore(output, DescribedPart)


def read_described(store: PartStore[DescribedPart], versions: Collection[str]) -> tuple[Described, int]:
    """What earlier runs described, and how many parts of other versions were removed. Makes the directories.

    Notes that were quarantined because the engine failed are taken out of the quarantine, so that they are asked for
    again.

    Raises:
        OutputError: a file is damaged.
    """
    done, kept, foreign = Described(set(), set(), set()), [], 0
    for part_id in store.part_ids():
        rows, bad = _of(versions, store.rows(part_id)), _of(versions, store.quarantined(part_id))
        foreign += not len(rows) and not len(bad)
        if len(bad):
            lasting = bad.filter(pc.invert(bad.column("passing")))
            if len(lasting) < len(bad):
                write_whole_parquet(store.quarantine_path(part_id), lasting)
            bad = lasting
        if len(rows) or len(bad):
            kept.append(part_id)
            done.summaries.update(rows.column("note_id").to_pylist() if len(rows) else ())
            for row in bad.to_pylist():
                (done.without_image if row["reason"] == NO_IMAGE else done.quarantined).add(row["key"])
    store.clear_leftovers(kept)
    return done, foreign


def commit(
    store: PartStore[DescribedPart],
    model_fingerprint: str,
    good: Sequence[dict[str, Any]],
    bad: Sequence[dict[str, Any]],
) -> None:
    """Keep a batch.

    Args:
        good: rows of SUMMARY_SCHEMA and ``version``.
        bad: ``note_id``, ``reason``, ``version``, ``passing``.
    """
    quarantined = quarantine_table("notes", "image", [(row["note_id"], row["reason"]) for row in bad])
    for field in (_VERSION, _PASSING):
        quarantined = quarantined.append_column(field, pa.array([row[field.name] for row in bad], field.type))
    finished = DescribedPart(
        part_id=f"part-{uuid.uuid4().hex[:12]}",
        model_fingerprint=model_fingerprint,
        summaries=len(good),
        quarantined=len(bad),
    )
    store.commit(finished, pa.Table.from_pylist(list(good), schema=_ROWS), quarantined)


def compile_summaries(store: PartStore[DescribedPart], versions: Collection[str]) -> pa.Table:
    """Write ``summaries.parquet``, in the order of note ids; returns the table."""
    tables = [_of(versions, table) for table in store.tables(store.part_ids())]
    table = pa.concat_tables([_ROWS.empty_table(), *tables]).select(SUMMARY_SCHEMA.names)
    table = table.take(pc.sort_indices(table, sort_keys=[("note_id", "ascending")])).cast(SUMMARY_SCHEMA)
    write_whole_parquet(store.output / "summaries.parquet", table)
    return table


def _of(versions: Collection[str], table: pa.Table | None) -> pa.Table:
    if table is None:
        return pa.table({})
    return table.filter(pc.is_in(table.column("version"), value_set=pa.array(list(versions), pa.string())))
