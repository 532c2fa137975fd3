"""Which version of a source's tables a job read: enough to notice that they changed, without reading them."""

from __future__ import annotations

from pathlib import Path

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.data import MicroLensSettings, MovieLensSettings, Source, TabularSettings
from notellm2_ray.data.sources.files import list_files

Version = list[tuple[str, int, int]]  # path, bytes, nanoseconds of the last change; of a URI its name alone


def table_versions(source: Source) -> dict[str, Version] | None:
    """The files of each table by its setting; empty of the synthetic world, None where a table is not there."""
    tables: dict[str, list[str]] = {}
    try:
        if isinstance(source, TabularSettings):
            for name in ("notes", "events"):
                files = list_files(getattr(source, name), source.format, f"source.{name}")
                tables[f"source.{name}"] = [file.path for file in files]
        elif isinstance(source, MicroLensSettings):
            tables = {"source.pairs": [str(source.pairs)], "source.titles": [str(source.titles)]}
        elif isinstance(source, MovieLensSettings):
            tables = {"source.directory": [str(source.directory / name) for name in ("ratings.csv", "movies.csv")]}
        return {name: [_version(path) for path in paths] for name, paths in tables.items()}
    except (DataError, FileNotFoundError):
        return None


def _version(path: str) -> tuple[str, int, int]:
    if "://" in path:
        return path, -1, -1
    found = Path(path).stat()
    return str(Path(path).absolute()), found.st_size, found.st_mtime_ns
