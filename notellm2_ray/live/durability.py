"""What Lance leaves undone on a local disk: fsync, one writer at a time, and a sound table after a loss of power.

Lance publishes a version by linking its manifest into place, so a killed process leaves the last version whole. It
syncs nothing, though, so after a loss of power the newest files may be empty. Here new data is synced before its
manifest is published and the manifest before anybody is told; what a loss of power can then damage is a version that
nobody was told of, and :func:`set_aside_torn_versions` takes that out of the way.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import DataError, OutputError

log = logging.getLogger(__name__)

VERSIONS = "_versions"
_MAGIC = b"LANC"  # ends a manifest and a data file
_MAX_TORN = 8
_U64 = 2**64 - 1  # a manifest's name counts down from it
# What Lance says, in an OSError without a number, of a file that is missing, too short or holds something else.
_WRONG_BYTES = ("Not found", "orrupt", "nvalid range", "Out of range", "Invalid user input", "LanceError(Arrow)")


class WriterLock:
    """Held by the one process that writes a table; the system releases it when that process ends, however it ends."""

    def __init__(self, table: Path):
        """Take the lock.

        Raises:
            OutputError: another process, named, has it.
        """
        path = table.with_name(table.name + ".lock")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 200).decode(errors="replace") or "another process"
            os.close(self._descriptor)
            raise OutputError(
                f"{table} is being written by {holder}: one writer at a time; stop it first, or send it your changes"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Give the lock up."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def sync(paths: Iterable[Path]) -> None:
    """Flush files or directories to the disk; one that a clean-up has removed meanwhile is passed over."""
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
    """Flush the data and deletion files that a merge has written but not yet published."""
    operation = transaction.operation
    files = [table / "data" / file.path for fragment in operation.new_fragments for file in fragment.files]
    deletions = [
        table / fragment.deletion_file.path(fragment.id)
        for fragment in operation.updated_fragments
        if fragment.deletion_file is not None
    ]
    # A fragment that lost rows before has its older, synced file under the same attribute: syncing it again is cheap.
    folders = [table / "data"] + ([table / "_deletions"] if deletions else [])
    sync([*files, *deletions, *folders])


def sync_version(table: Path, version: int) -> None:
    """Flush a published manifest."""
    sync([manifest(table, version), table / VERSIONS])


def listing(table: Path) -> set[Path]:
    """All files below a table."""
    return {Path(folder) / name for folder, _, names in os.walk(table) for name in names}


def sync_new(table: Path, before: set[Path]) -> None:
    """Flush the files that came since a :func:`listing`, and all directories."""
    sync(sorted(listing(table) - before))
    sync(Path(folder) for folder, _, _ in os.walk(table))


def manifest(table: Path, version: int) -> Path:
    """The manifest of a version."""
    return table / VERSIONS / f"{_U64 - version:020d}.manifest"


def manifests(table: Path) -> list[Path]:
    """The manifests of a table, newest first; none where there is no table.

    Raises:
        OSError: the directory cannot be read. (``Path.glob`` would find nothing there, as if there were no table.)
    """
    try:
        names = os.listdir(table / VERSIONS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [table / VERSIONS / name for name in sorted(names) if name.endswith(".manifest")]


def set_aside_torn_versions(table: Path) -> int:
    """Take versions that a loss of power left damaged out of a table; only its writer may call this.

    The newest version is looked at, and the one before it if that one is damaged, and so on to a sound one; only then
    is anything renamed. Nothing of the damaged ones was acknowledged: that happens after the files are on the disk.

    Returns:
        How many were set aside.

    Raises:
        DataError: no version of the table is sound.
        OutputError: the table could not be read, which says nothing of what it holds; nothing was changed.
    """
    versions = manifests(table)[: _MAX_TORN + 1]
    torn: list[Path] = []
    reason: str | None = "it has no version"
    for path in versions:
        try:
            reason = _damage(table, path)
        except OSError as error:
            raise OutputError(f"{table} cannot be read, and was left as it is: {_first_line(error)}") from error
        if reason is None:
            break
        log.warning("%s: version %s is damaged: %s", table, _U64 - int(path.stem), reason)
        torn.append(path)
    if len(torn) == len(versions):
        raise DataError(f"{table} is damaged ({reason}): restore it from a copy, or remove it and seed it again")
    if torn:
        (table / VERSIONS / "latest_version_hint.json").unlink(missing_ok=True)
        for path in torn:  # newest first: a kill in between leaves the rest to the next start
            path.rename(path.with_name(f"torn-{path.name}.bad"))
        sync([table / VERSIONS])
    return len(torn)


def _damage(table: Path, path: Path) -> str | None:
    """What is wrong with the version of a manifest; None if nothing is.

    Raises:
        OSError: it cannot be told, because the disk or the network fails, or for want of permission.
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
        version.count_rows("note_id = ''")  # through the index
    except (OSError, ValueError, RuntimeError) as error:
        if not _tells_of_damage(error):
            raise OSError(_first_line(error)) from error
        return _first_line(error)
    return None


def _tells_of_damage(error: Exception) -> bool:
    """Whether what reading raised says that a file is missing or holds the wrong bytes.

    Everything else may pass (a failing disk, a stale NFS handle), and must not cost a version that was acknowledged.
    Lance gives the system's errors as text, with their number.
    """
    number = getattr(error, "errno", None)
    text = str(error)
    told = re.search(r"\(os error (\d+)\)", text)
    if number is None and told:
        number = int(told.group(1))
    if number is not None:
        return number == errno.ENOENT
    return not isinstance(error, OSError) or any(words in text for words in _WRONG_BYTES)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _ends_well(path: Path) -> bool:
    # All of it is read, so that a failing disk is heard of here: Lance would say that there is no such version.
    return path.read_bytes().endswith(_MAGIC)
