"""What Lance does not do on a local disk: fsync, one writer at a time, and a readable table after a power failure.

Lance publishes a version by linking its manifest into place, so the last version stays whole if a process is killed.
But Lance syncs nothing, so after a power failure the newest files may be empty. Here new data is synced before its
manifest is published, and the manifest before the write is acknowledged. A power failure can then damage only versions
that were not acknowledged; :func:`set_aside_torn_versions` removes those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import DataError, ModelError, OutputError

log = logging.getLogger(__name__)

VERSIONS = "_versions"
_MAGIC = b"LANC"  # ends a manifest and a data file
_MAX_TORN = 8
_U64 = 2**64 - 1  # manifests are named by this number minus their version
# Words of Lance's errors (OSErrors without errno) about a file that is missing, too short or has other content.
_WRONG_BYTES = ("Not found", "orrupt", "nvalid range", "Out of range", "Invalid user input", "LanceError(Arrow)")


class WriterLock:
    """The lock of the one process that writes a table; the operating system releases it when that process ends."""

    def __init__(self, table: Path):
        """Take the lock.

        Raises:
            OutputError: another process has it; the message names that process.
        """
        path = table.with_name(table.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 200).decode(errors="replace") or "another process"
            os.close(self._descriptor)
            raise OutputError(
                f"{table} is being written by {holder}, and a table may have one writer only: stop that writer first, "
                "or send it your changes"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def sync(paths: Iterable[Path]) -> None:
    """Flush files or directories to the disk; paths that a clean-up has removed meanwhile are skipped."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_transaction(table: Path, transaction: Any) -> None:
    """Flush the data and deletion files of a merge that is not published yet."""
    operation = transaction.operation
    files = [table / "data" / file.path for fragment in operation.new_fragments for file in fragment.files]
    deletions = [
        table / fragment.deletion_file.path(fragment.id)
        for fragment in operation.updated_fragments
        if fragment.deletion_file is not None
    ]
    # A fragment that lost rows in an earlier merge names that merge's file, already synced: syncing it again is cheap.
    folders = [table / "data"] + ([table / "_deletions"] if deletions else [])
    sync([*files, *deletions, *folders])


def sync_version(table: Path, version: int) -> None:
    """Flush a published manifest."""
    sync([manifest(table, version), table / VERSIONS])


def listing(table: Path) -> set[Path]:
    """All files below a table."""
    return {Path(folder) / name for folder, _, names in os.walk(table) for name in names}


def newest_bytes(dataset: Any) -> int:
    """Bytes of the rows' files in a dataset's version."""
    return sum(file.file_size_bytes or 0 for part in dataset.get_fragments() for file in part.metadata.files)


def old_bytes(dataset: Any, table: Path) -> int:
    """Bytes of a table's other files: of older versions, and some of the version itself."""
    found = 0
    for path in listing(table):
        with contextlib.suppress(FileNotFoundError):  # a merge's temporary file
            found += path.stat().st_size
    return found - newest_bytes(dataset)


def sync_new(table: Path, before: set[Path]) -> None:
    """Flush the files that were added since a :func:`listing`, and all directories."""
    sync(sorted(listing(table) - before))
    sync(Path(folder) for folder, _, _ in os.walk(table))


def manifest(table: Path, version: int) -> Path:
    """The manifest of a version."""
    return table / VERSIONS / f"{_U64 - version:020d}.manifest"


def manifests(table: Path) -> list[Path]:
    """The manifests of a table, newest first; none if there is no table.

    Raises:
        OSError: the directory cannot be read. (``Path.glob`` would find no file, as if there were no table.)
    """
    try:
        names = os.listdir(table / VERSIONS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [table / VERSIONS / name for name in sorted(names) if name.endswith(".manifest")]


def set_aside_torn_versions(table: Path) -> int:
    """Remove versions that a power failure damaged from a table; only its writer may call this.

    Versions are checked from the newest backwards until one is sound; only then the damaged ones are renamed. No write
    in them was acknowledged: that happens only after the files are on the disk.

    Returns:
        The number of versions set aside.

    Raises:
        DataError: no version of the table is sound.
        OutputError: the table could not be read, so its content is not known; nothing was changed.
    """
    versions = manifests(table)[: _MAX_TORN + 1]
    torn: list[Path] = []
    reason: str | None = "it has no version"
    for path in versions:
        try:
            reason = _damage(table, path)
        except OSError as error:
            raise OutputError(f"{table} cannot be read; nothing in it was changed: {_first_line(error)}") from error
        if reason is None:
            break
        log.warning("%s: version %s is damaged: %s", table, _U64 - int(path.stem), reason)
        torn.append(path)
    if len(torn) == len(versions):
        raise DataError(f"{table} is damaged ({reason}): restore it from a copy, or remove it and seed it again")
    if torn:
        (table / VERSIONS / "latest_version_hint.json").unlink(missing_ok=True)
        for path in torn:  # newest first, so that the next start finds the others after a kill
            path.rename(path.with_name(f"torn-{path.name}.bad"))
        sync([table / VERSIONS])
    return len(torn)


def write_error(error: BaseException, path: Path) -> Exception:
    """A failed write as an error of ours, with a remedy if the disk is full."""
    text = str(error)
    if "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return OutputError(
            f"no space left while writing {path}: nothing of this call was acknowledged; free some space"
        )
    if isinstance(error, (DataError, OutputError, ModelError)):
        return error
    return OutputError(f"{path} could not be written: {text.splitlines()[0] if text else type(error).__name__}")


def _damage(table: Path, path: Path) -> str | None:
    """What is damaged in the version of a manifest; None for a sound one.

    Raises:
        OSError: the version could not be checked: the disk or the network fails, or permission is missing.
    """
    import lance

    if not _ends_well(path):
        return "its manifest is cut short"
    try:
        version = lance.dataset(str(table), version=_U64 - int(path.stem))
        for fragment in version.get_fragments():
            for file in fragment.metadata.files:
                where = table / "data" / file.path
                if file.file_size_bytes and where.stat().st_size != file.file_size_bytes:
                    return f"{where.name} is cut short"
            deletions = fragment.metadata.deletion_file
            if deletions is not None and not (table / deletions.path(fragment.fragment_id)).stat().st_size:
                return f"the deletions of fragment {fragment.fragment_id} are empty"
        version.count_rows("note_id = ''")  # reads the index too
    except (OSError, ValueError, RuntimeError) as error:
        if not _means_damage(error):
            raise OSError(_first_line(error)) from error
        return _first_line(error)
    return None


def _means_damage(error: Exception) -> bool:
    """Whether an error of reading says that a file is missing or has the wrong content.

    All other errors may be temporary (a failing disk, a stale NFS handle) and must not cost an acknowledged version.
    Lance reports errors of the operating system as text that contains their number.
    """
    number = getattr(error, "errno", None)
    text = str(error)
    system_error = re.search(r"\(os error (\d+)\)", text)
    if number is None and system_error:
        number = int(system_error.group(1))
    if number is not None:
        return number == errno.ENOENT
    return not isinstance(error, OSError) or any(words in text for words in _WRONG_BYTES)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _ends_well(path: Path) -> bool:
    # Reads the whole file, so that a failing disk raises here: Lance would only say that there is no such version.
    return path.read_bytes().endswith(_MAGIC)
