"""What a finished block leaves behind: one file of vectors, one of quarantined notes, each complete or absent.

The vectors' file is renamed into place last, after everything of the block is on disk, so its presence means that the
block is done. Its footer carries the block's counts, from which a later run takes them up.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.schema import QUARANTINE_SCHEMA
from notellm2_ray.infer.blocks import Block

BLOCKS, QUARANTINE = "blocks", "quarantine"
_EMBEDDED, _QUARANTINED, _MODEL = b"notellm2.embedded", b"notellm2.quarantined", b"notellm2.model_fingerprint"


class Finished(NamedTuple):
    """A finished block's counts."""

    block_id: str
    embedded: int
    quarantined: int
    model_fingerprint: str


def commit_block(
    output: Path, block: Block, vectors: pa.Table, quarantined: Sequence[tuple[str, str]], model_fingerprint: str
) -> Finished:
    """Write a block's files.

    Args:
        vectors: ``note_id`` and the vector columns.
        quarantined: (note_id, reason) of the notes without a vector.
    """
    if quarantined:
        source = f"{block.file}, rows {block.start} to {block.start + block.rows}"
        rows = [{"table": "notes", "source": source, "key": key, "reason": reason} for key, reason in quarantined]
        path = output / QUARANTINE / f"{block.block_id}.parquet"
        _write(path, pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))
    footer = {
        _EMBEDDED: str(len(vectors)).encode(),
        _QUARANTINED: str(len(quarantined)).encode(),
        _MODEL: model_fingerprint.encode(),
    }
    _write(block_path(output, block.block_id), vectors.replace_schema_metadata(footer))
    _attempts(output, block.block_id).unlink(missing_ok=True)
    return Finished(block.block_id, len(vectors), len(quarantined), model_fingerprint)


def begin_attempt(output: Path, block_id: str) -> int:
    """Note down that a block is begun; returns how often it now was in this run. :func:`commit_block` wipes it out.

    Ray restarts a dead actor without end, so a block that kills its actor every time has to be known by something that
    outlives it.
    """
    with open(_attempts(output, block_id), "ab") as file:
        file.write(b".")
        return file.tell()


def read_finished(output: Path, block_id: str) -> Finished | None:
    """The counts of a block, or None where it is still to be done.

    Raises:
        OutputError: its file is damaged.
    """
    path = block_path(output, block_id)
    try:
        footer = pq.read_schema(path).metadata or {}
        return Finished(block_id, int(footer[_EMBEDDED]), int(footer[_QUARANTINED]), footer[_MODEL].decode())
    except FileNotFoundError:
        return None
    except (OSError, KeyError, pa.ArrowException) as error:
        raise OutputError(f"{path} is damaged ({error}): delete it and run the command again") from error


def read_vectors_in_order(output: Path, blocks: Sequence[Block]) -> Iterator[pa.RecordBatch]:
    """The vectors of all blocks, in the order of the input, a block at a time."""
    for block in blocks:
        yield from pq.read_table(block_path(output, block.block_id)).replace_schema_metadata(None).to_batches()


def first_reasons(output: Path, limit: int = 3) -> list[str]:
    """Reasons of some quarantined notes, to be shown in an error."""
    reasons: list[str] = []
    for path in sorted((output / QUARANTINE).glob("*.parquet")):
        reasons += pq.read_table(path, columns=["reason"]).column(0).to_pylist()
        if len(reasons) >= limit:
            break
    return reasons[:limit]


def clear_leftovers(output: Path, blocks: Sequence[Block]) -> int:
    """Remove what a killed run half wrote, and the files of blocks that are not part of this job.

    Returns:
        How many finished blocks of another model, other settings or other notes were removed.
    """
    names = {f"{block.block_id}.parquet" for block in blocks}
    removed = 0
    for folder in (BLOCKS, QUARANTINE):
        (output / folder).mkdir(parents=True, exist_ok=True)
        for path in (output / folder).iterdir():
            if path.name not in names and path.suffix in (".parquet", ".partial", ".attempts"):
                path.unlink(missing_ok=True)
                removed += folder == BLOCKS and path.suffix == ".parquet"
    return removed


def block_path(output: Path, block_id: str) -> Path:
    """Where a block's vectors lie."""
    return output / BLOCKS / f"{block_id}.parquet"


def _attempts(output: Path, block_id: str) -> Path:
    return output / BLOCKS / f"{block_id}.attempts"


def _write(path: Path, table: pa.Table) -> None:
    """A Parquet file at ``path``, whole or not at all, even if the machine loses power."""
    # A name of its own for every attempt: after a kill, a dying writer and its successor may be at the same block.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            pq.write_table(table, file, compression="none")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor: Any = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
