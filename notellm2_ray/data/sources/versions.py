"""Which version of a source's tables a job read: enough to notice that they changed, without reading them."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.data import MicroLensSettings, MovieLensSettings, Source, TabularSettings
from notellm2_ray.data.sources.files import list_files, uri_files
from notellm2_ray.data.sources.microlens import image_names
from notellm2_ray.data.sources.movielens import poster_files

Version = list[tuple[str, int, int]]  # path, bytes, nanoseconds of the last change; of an image its path alone


def table_versions(source: Source) -> dict[str, Version] | None:
    """The files of each table, and which images there are, by the setting that names them; empty of the synthetic
    world, None where a table is not there."""
    try:
        if isinstance(source, TabularSettings):
            patterns = {"source.notes": source.notes, "source.events": source.events}
            return {name: _tabular(pattern, source.format, name) for name, pattern in patterns.items()}
        if isinstance(source, MicroLensSettings):
            versions = {"source.pairs": [_version(source.pairs)], "source.titles": [_version(source.titles)]}
            covers = source.covers
            return versions | ({"source.covers": _images(image_names(covers, "source.covers"))} if covers else {})
        if isinstance(source, MovieLensSettings):
            tables = [source.directory / name for name in ("ratings.csv", "movies.csv")]
            tags = source.directory / "tags.csv"  # the one that may be absent
            versions = {"source.directory": [_version(path) for path in [*tables, *([tags] if tags.is_file() else [])]]}
            # With posters_only they decide which movies are notes.
            return versions | {"source.directory/posters": _images(poster_files(source))}
        return {}
    except (DataError, FileNotFoundError):
        return None


def _tabular(pattern: str, format_: str, setting: str) -> Version:
    if "://" not in pattern:
        return [_version(Path(file.path)) for file in list_files(pattern, format_, setting)]
    files = uri_files(pattern)
    if not files or any(info.type == fs.FileType.NotFound for _, info in files):
        raise DataError(f"{pattern}: no such table file; set {setting}")
    return [(uri, info.size, info.mtime_ns) for uri, info in files]


def _version(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns


def _images(paths: dict[str, str]) -> Version:
    return [(path, -1, -1) for path in sorted(paths.values())]
