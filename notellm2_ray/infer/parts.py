"""The store of resumable parts: a long job is cut into parts, and each finished part is a file.

Under a job's output directory:

    parts/<id>.parquet        the part's rows; the counts of the part are in the file's footer
    parts/<id>.attempts       one byte for each time that the part was begun and not finished
    quarantine/<id>.parquet   the rows that the part could not make, with the reasons (QUARANTINE_SCHEMA)

The file of rows is renamed into place last, after everything else of the part is on disk. Its presence therefore means
that the part is finished, and a later run of the same job skips it. A kill costs the parts that were being made.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic, TypeVar, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.errors import ModelError, OutputError
from notellm2_ray.core.schema import QUARANTINE_SCHEMA

QUARANTINE = "quarantine"
MAX_ATTEMPTS = 4  # at one part within a run; a part that kills its actor this often stops the job
_FOOTER = "notellm2."  # before the name of each value in a footer


@dataclass(frozen=True, kw_only=True)
class FinishedPart:
    """The record of a finished part. A job's own subclass adds its counts.

    All fields but ``part_id`` are written to the footer of the part's file; they are of type int or str.
    """

    part_id: str
    model_fingerprint: str  # of the model that made the part


F = TypeVar("F", bound=FinishedPart)


def recorded_fields(kind: type[F]) -> dict[str, type]:
    """Name and type (int or str) of each field of a record but ``part_id``."""
    return {name: found for name, found in get_type_hints(kind).items() if name != "part_id"}


class PartStore(Generic[F]):
    """The parts of one job.

    Args:
        output: the job's directory.
        kind: the class of the records of finished parts.
        folder: name of the directory of the files of rows.
        compression: of the files of rows, as ``pyarrow.parquet`` names it.
    """

    def __init__(self, output: Path, kind: type[F], *, folder: str = "parts", compression: str = "snappy") -> None:
        self.output, self.folder, self.quarantine = output, output / folder, output / QUARANTINE
        self._kind, self._compression = kind, compression

    def begin_attempt(self, part_id: str) -> int:
        """Count an attempt at a part; returns how many there were in this run. :meth:`commit` removes the count.

        It is kept on disk because Ray restarts a dead actor without a limit: a part that kills its actor every time
        must be recognised by something that outlives the actor.
        """
        with open(self._attempts(part_id), "ab") as file:
            file.write(b".")
            return file.tell()

    def commit(self, finished: F, rows: pa.Table, quarantined: pa.Table | None = None) -> F:
        """Write a part's files, the quarantine first and the rows last; returns ``finished``.

        Args:
            quarantined: from :func:`quarantine_table`; an empty table leaves no file.

        Raises:
            OSError: the files cannot be written, for instance because the disk is full. The part is then not finished.
        """
        if quarantined is not None and len(quarantined):
            write_whole_parquet(self.quarantine_path(finished.part_id), quarantined)
        else:
            self.quarantine_path(finished.part_id).unlink(missing_ok=True)  # of an attempt that was killed
        footer = {f"{_FOOTER}{name}": str(getattr(finished, name)) for name in recorded_fields(self._kind)}
        write_whole_parquet(self.path(finished.part_id), rows.replace_schema_metadata(footer), self._compression)
        self._attempts(finished.part_id).unlink(missing_ok=True)
        return finished

    def finished(self, part_id: str) -> F | None:
        """The record of a finished part; None if the part has yet to be made, or another version's file is there.

        Raises:
            OutputError: the part's file is damaged.
        """
        path = self.path(part_id)
        try:
            footer = pq.read_schema(path).metadata or {}
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from error
        types = recorded_fields(self._kind)
        found = {name: footer[key].decode() for name in types if (key := f"{_FOOTER}{name}".encode()) in footer}
        if found.keys() != types.keys():
            return None
        return self._kind(part_id=part_id, **{name: kind(found[name]) for name, kind in types.items()})

    def part_ids(self) -> list[str]:
        """Ids of all parts that have a file of rows, in order."""
        return sorted(path.stem for path in self.folder.glob("*.parquet"))

    def clear_leftovers(self, part_ids: Collection[str]) -> int:
        """Remove the half-written files of a killed run, and all parts but ``part_ids``. Makes the directories.

        Returns:
            How many finished parts were removed.
        """
        kept = {f"{part_id}.parquet" for part_id in part_ids}
        removed = 0
        for folder in (self.folder, self.quarantine):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if path.name not in kept and path.suffix in (".parquet", ".partial", ".attempts"):
                    path.unlink(missing_ok=True)
                    removed += folder == self.folder and path.suffix == ".parquet"
        return removed

    def rows(self, part_id: str) -> pa.Table:
        """The rows of a finished part, without the footer's values.

        Raises:
            OutputError: the part's file is missing or damaged.
        """
        return _read(self.path(part_id))

    def tables(self, part_ids: Iterable[str]) -> Iterator[pa.Table]:
        """The rows of finished parts, in the order of ``part_ids``, one part in memory at a time."""
        return map(self.rows, part_ids)

    def quarantined(self, part_id: str) -> pa.Table | None:
        """The quarantine of a part; None if it quarantined nothing."""
        path = self.quarantine_path(part_id)
        return _read(path) if path.exists() else None

    def first_reasons(self, words: str = "{key}: {reason}", limit: int = 3, leave_out: str | None = None) -> list[str]:
        """Reasons of the first quarantined rows, to be shown in an error.

        Args:
            words: how to phrase one, from its ``key`` and ``reason``.
            leave_out: a reason that is expected and not shown.
        """
        reasons: list[str] = []
        for path in sorted(self.quarantine.glob("*.parquet")):
            rows = _read(path).select(["key", "reason"]).to_pylist()
            reasons += [words.format(**row) for row in rows if row["reason"] != leave_out]
            if len(reasons) >= limit:
                break
        return reasons[:limit]

    def path(self, part_id: str) -> Path:
        """The file of a part's rows."""
        return self.folder / f"{part_id}.parquet"

    def quarantine_path(self, part_id: str) -> Path:
        """The file of a part's quarantined rows."""
        return self.quarantine / f"{part_id}.parquet"

    def _attempts(self, part_id: str) -> Path:
        return self.folder / f"{part_id}.attempts"


def quarantine_table(table: str, source: str, bad: Iterable[tuple[str, str]]) -> pa.Table:
    """Quarantined rows (QUARANTINE_SCHEMA) of ``table``, read from ``source``, from pairs of key and reason."""
    rows = [{"table": table, "source": source, "key": key, "reason": reason} for key, reason in bad]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def require_one_model(parts: Sequence[FinishedPart], output: Path) -> str:
    """The fingerprint of the model that made all ``parts`` (at least one).

    Raises:
        ModelError: different models made them.
    """
    models = {part.model_fingerprint for part in parts}
    if len(models) > 1:
        raise ModelError(
            f"the parts in {output} were made by {len(models)} different models ({', '.join(sorted(models))}): the "
            "model was replaced during the run, or embed.precision=auto met GPUs with and without bfloat16 (set it). "
            "Delete the directory and run the command again"
        )
    return models.pop()


def write_whole_parquet(path: Path, table: pa.Table, compression: str = "snappy") -> None:
    """Write a Parquet file with :func:`whole_file`."""
    with whole_file(path) as file:
        pq.write_table(table, file, compression=compression)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at ``path`` when the block ends: complete or absent, even after a power failure."""
    # Each attempt has a name of its own: after a kill, a dying writer and its successor may be at work on one part.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path).replace_schema_metadata(None)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> OutputError:
    return OutputError(f"{path} is damaged ({error}): delete it and run the command again")
