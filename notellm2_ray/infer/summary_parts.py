"""What batches of image summaries leave behind: small files, each whole or absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.schema import QUARANTINE_SCHEMA, SUMMARY_SCHEMA
from notellm2_ray.infer.summary_rows import NO_IMAGE

PARTS, QUARANTINE = "parts", "quarantine"
# Of the model, the prompt, the settings and the notes file: a summary of anything else is none of ours.
_VERSION = pa.field("version", pa.string(), nullable=False)
_PART = SUMMARY_SCHEMA.append(_VERSION)
# The engine failed on it, and not its image: the next run asks again.
_PASSING = pa.field("passing", pa.bool_(), nullable=False)
_BAD = QUARANTINE_SCHEMA.append(_VERSION).append(_PASSING)


class Committed(NamedTuple):
    """Notes that are done with."""

    summaries: set[str]
    quarantined: set[str]  # of these, the image or its description was bad
    without_image: set[str]

    @property
    def ids(self) -> set[str]:
        return self.summaries | self.quarantined | self.without_image


def begin(output: Path, versions: Collection[str]) -> tuple[Committed, int]:
    """Make the directories ready; what earlier runs committed, and how many files of other versions were removed.

    What was quarantined because the engine failed is forgotten, and so asked for again.

    Raises:
        OutputError: a file is damaged.
    """
    removed = 0
    done = Committed(set(), set(), set())
    for folder in (PARTS, QUARANTINE):
        (output / folder).mkdir(parents=True, exist_ok=True)
        for path in (output / folder).glob("*.partial"):
            path.unlink(missing_ok=True)
    for path in sorted((output / PARTS).glob("*.parquet")):
        table = _valid(path, versions)
        removed += not len(table) and _remove(path)
        done.summaries.update(table.column("note_id").to_pylist())
    for path in sorted((output / QUARANTINE).glob("*.parquet")):
        table = _valid(path, versions)
        removed += not len(table) and _remove(path)
        lasting = table.filter(pc.invert(table.column("passing")))
        if len(lasting) < len(table):
            write(path, lasting)
            table = lasting
        for key, reason in zip(table.column("key").to_pylist(), table.column("reason").to_pylist(), strict=True):
            (done.without_image if reason == NO_IMAGE else done.quarantined).add(key)
    return done, removed


def commit(output: Path, summaries: Sequence[dict[str, Any]], bad: Sequence[dict[str, Any]]) -> None:
    """Put a batch on disk.

    Args:
        summaries: rows of SUMMARY_SCHEMA and ``version``.
        bad: ``note_id``, ``reason``, ``version``, ``passing``.
    """
    name = f"part-{uuid.uuid4().hex[:12]}.parquet"
    if bad:
        rows = [
            {
                "table": "notes",
                "source": "image",
                "key": row["note_id"],
                "reason": row["reason"],
                "version": row["version"],
                "passing": row["passing"],
            }
            for row in bad
        ]
        write(output / QUARANTINE / name, pa.Table.from_pylist(rows, schema=_BAD))
    if summaries:
        write(output / PARTS / name, pa.Table.from_pylist(list(summaries), schema=_PART))


def compile_parts(output: Path, versions: Collection[str]) -> pa.Table:
    """Write ``summaries.parquet``, by note id; returns it."""
    tables = [_valid(path, versions) for path in sorted((output / PARTS).glob("*.parquet"))]
    table = pa.concat_tables(tables).select(SUMMARY_SCHEMA.names) if tables else SUMMARY_SCHEMA.empty_table()
    table = table.take(pc.sort_indices(table, sort_keys=[("note_id", "ascending")])).cast(SUMMARY_SCHEMA)
    write(output / "summaries.parquet", table)
    return table


def first_reasons(output: Path, limit: int = 3) -> list[str]:
    """Reasons of some quarantined notes, to be shown in an error."""
    reasons: list[str] = []
    for path in sorted((output / QUARANTINE).glob("*.parquet")):
        table = pq.read_table(path, columns=["key", "reason"])
        found = zip(table.column("key").to_pylist(), table.column("reason").to_pylist(), strict=True)
        reasons += [f"note {key}: {reason}" for key, reason in found if reason != NO_IMAGE]
        if len(reasons) >= limit:
            break
    return reasons[:limit]


def write(path: Path, table: pa.Table) -> None:
    """A Parquet file at ``path``, whole or not at all, even if the machine loses power."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _valid(path: Path, versions: Collection[str]) -> pa.Table:
    try:
        table = pq.read_table(path)
        return table.filter(pc.is_in(table.column("version"), value_set=pa.array(list(versions), pa.string())))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise OutputError(f"{path} is damaged ({error}): delete it and run the command again") from error


def _remove(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True
