"""The files of a table: which they are, their rows as a Ray dataset, and their versions."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.image_formats import ENDINGS
from notellm2_ray.core.settings.sources import Version
from notellm2_ray.data.rows import FATAL, failed_row

if TYPE_CHECKING:
    import ray.data

_ENDINGS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}


class TableFile(NamedTuple):
    """One file of a table."""

    path: str  # path or URI
    format: str  # parquet, jsonl or csv


def list_files(pattern: str, format_: str, setting: str) -> list[TableFile]:
    """The files of a table, in the order of their names.

    Args:
        pattern: a file, a directory (searched with its sub-directories), a glob, or a URI of a file or directory.
        format_: parquet, jsonl or csv; ``auto`` goes by the files' endings.
        setting: the setting that ``pattern`` came from, for messages.

    Raises:
        DataError: there are none, or the ending of one is of no known format.
    """
    if "://" in pattern:
        paths = [path for path, _ in uri_files(pattern)]
    elif Path(pattern).is_dir():
        found = (path for path in Path(pattern).rglob("*") if path.is_file() and not path.name.startswith((".", "_")))
        paths = sorted(str(path) for path in found if format_ != "auto" or ending(str(path)) in _ENDINGS)
    else:
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise DataError(f"{pattern}: no such table file; set {setting} to a file, directory or glob")
    # Absolute, because Ray's workers may run in another directory.
    paths = [path if "://" in path else os.path.abspath(path) for path in paths]
    return [TableFile(path, _format(path, setting) if format_ == "auto" else format_) for path in paths]


def uri_files(uri: str) -> list[tuple[str, fs.FileInfo]]:
    """The file at a URI, or all table files below the directory at it: the URI of each, and its size and time.

    Raises:
        DataError: the URI cannot be listed.
    """
    try:
        system, path = fs.FileSystem.from_uri(uri)
        info = system.get_file_info(path)
        if info.type != fs.FileType.Directory:
            return [(uri, info)]
        entries = system.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{uri}: cannot be listed: {error}") from error
    prefix = uri.rstrip("/").removesuffix(path.rstrip("/"))
    found = sorted((entry for entry in entries if entry.is_file), key=lambda entry: entry.path)
    return [(prefix + entry.path, entry) for entry in found if ending(entry.path) in _ENDINGS]


def ending(path: str) -> str:
    """The ending that tells a file's format, without the ending of its compression."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def _format(path: str, setting: str) -> str:
    try:
        return _ENDINGS[ending(path)]
    except KeyError:
        raise DataError(
            f"{path} ({setting}): its ending is of no known format ({', '.join(_ENDINGS)}); "
            "set source.format to parquet, jsonl or csv"
        ) from None


def dataset(files: Sequence[TableFile], read: Callable[[TableFile], Iterator[pa.Table]]) -> ray.data.Dataset:
    """The rows of all files as a lazy Ray dataset, one task a file; Ray must be connected.

    Args:
        read: gives the rows of one file, in the task. A :class:`DataError` that it raises becomes a last row of
            category "unreadable file", because Ray does not pass on an error's type and message.
    """
    import ray.data

    def read_one(block: pa.Table) -> Iterator[pa.Table]:
        for path, format_ in zip(block["path"].to_pylist(), block["format"].to_pylist(), strict=True):
            try:
                yield from read(TableFile(path, format_))
            except DataError as error:
                yield failed_row(path, f"{FATAL}: {error}")

    items = ray.data.from_items([file._asdict() for file in files], override_num_blocks=len(files))
    return items.map_batches(read_one, batch_format="pyarrow", batch_size=None)


def image_names(folder: Path, setting: str) -> dict[str, str]:
    """File name without its ending -> absolute path, for the images in a folder.

    Raises:
        DataError: there is no such folder.
    """
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(ENDINGS))
    except OSError as error:
        raise DataError(f"{folder}: not a readable folder of images ({error.strerror}); set {setting}") from error
    return {os.path.splitext(name)[0]: os.path.join(os.path.abspath(folder), name) for name in entries}


def ref_to(value: object) -> Any:
    """A reference to ``value`` in Ray's object store, so that it is not sent with every task."""
    import ray

    return ray.put(value)


def table_version(pattern: str, format_: str, setting: str) -> Version:
    """The version of a table's files; the arguments are those of :func:`list_files`.

    Raises:
        DataError: there is no such table.
    """
    if "://" not in pattern:
        return [file_version(Path(file.path)) for file in list_files(pattern, format_, setting)]
    files = uri_files(pattern)
    if not files or any(info.type == fs.FileType.NotFound for _, info in files):
        raise DataError(f"{pattern}: no such table file; set {setting}")
    return [(uri, info.size, info.mtime_ns) for uri, info in files]


def file_version(path: Path) -> tuple[str, int, int]:
    """Path, size and time of one local file: enough to notice a change without reading it.

    Raises:
        FileNotFoundError: there is none.
    """
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns


def image_version(paths: Mapping[str, str]) -> Version:
    """The version of a folder of images (:func:`image_names`). Images are compared by name, not by content."""
    return [(path, -1, -1) for path in sorted(paths.values())]
