"""MovieLens with posters as a source: movies are notes, ratings are views and clicks.

https://grouplens.org/datasets/movielens/
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.sources import Source, SourceSettings, Version
from notellm2_ray.data.columns import Column, flat, show, to_text
from notellm2_ray.data.rows import WRONG_VALUE, raw_events, raw_notes
from notellm2_ray.data.sources import SourceTables
from notellm2_ray.data.sources.files import TableFile, dataset, file_version, image_names, image_version, ref_to
from notellm2_ray.data.sources.formats import column_names, read_batches

NO_GENRES = "(no genres listed)"
CLICK_DELAY_US = 1_000  # a click comes a millisecond after its view, so that their order is defined

_BATCH = 50_000
_COLUMNS = {
    "movies.csv": ("movieId", "title", "genres"),
    "ratings.csv": ("userId", "movieId", "rating", "timestamp"),
    "tags.csv": ("userId", "movieId", "tag", "timestamp"),
}
log = logging.getLogger("notellm2_ray")


class MovieLensSettings(SourceSettings):
    """MovieLens with posters: ratings.csv, movies.csv, tags.csv and a folder of poster images named MOVIEID.jpg."""

    kind: Literal["movielens"]
    directory: Path = Field(description="folder that holds ratings.csv, movies.csv and posters/")
    click_rating: float = Field(3.5, description="every rating is a view; one of at least this value is also a click")
    posters_only: bool = Field(True, description="keep only the movies that have a poster")


def movielens_tables(settings: MovieLensSettings, seed: int = 0) -> SourceTables:
    """Notes are the movies: title, genres as topics, distinct tags as content, poster as image.

    Every rating is a view; one of at least ``click_rating`` is also a click, a millisecond later. With
    ``posters_only``, movies without a poster and their ratings are left out of the data set.

    Raises:
        DataError: a file is missing or is not laid out as MovieLens's are.
    """
    movies, ratings = _file(settings, "movies.csv"), _file(settings, "ratings.csv")
    posters = poster_files(settings)
    if settings.posters_only:
        log.info(
            "movielens: only movies that have one of the %s posters, and their ratings, are read", f"{len(posters):,}"
        )
    shared = ref_to((posters, _tags(settings)))
    return SourceTables(
        notes=dataset([movies], lambda file: _read_movies(file, settings, shared)),
        events=dataset([ratings], lambda file: _read_ratings(file, settings, shared)),
    )


def poster_files(settings: MovieLensSettings) -> dict[str, str]:
    """Movie id -> absolute path of its poster.

    Raises:
        DataError: there is no folder of posters although ``posters_only`` needs one.
    """
    folder = settings.directory / "posters"
    if not settings.posters_only and not folder.exists():
        return {}
    return image_names(folder, "source.directory to a folder that holds posters/, or source.posters_only=false")


def _file(settings: MovieLensSettings, name: str) -> TableFile:
    path = settings.directory / name
    if not path.is_file():
        raise DataError(f"{path}: no such file; set source.directory to the folder of MovieLens that holds {name}")
    file = TableFile(os.path.abspath(path), "csv")
    present = column_names(file)
    missing = [column for column in _COLUMNS[name] if column not in present]
    if missing:
        raise DataError(
            f"{path}: missing column {missing[0]!r}; its columns are {', '.join(present)}. source.directory must hold "
            f"MovieLens's own files, {name} with {','.join(_COLUMNS[name])}"
        )
    return file


def _tags(settings: MovieLensSettings) -> dict[str, str]:
    """Movie id -> its distinct tags in the file's order, joined. Tags that differ only in case are one tag."""
    if not (settings.directory / "tags.csv").is_file():
        log.info("movielens: there is no tags.csv, so movies have no content")
        return {}
    tags: dict[str, dict[str, str]] = {}
    unusable = 0
    for raw in read_batches(_file(settings, "tags.csv"), ("movieId", "tag"), _BATCH):
        if "tag" not in raw.column_names:
            unusable += raw.num_rows
            continue
        movies, words = to_text(raw["movieId"]).values.to_pylist(), to_text(raw["tag"]).values.to_pylist()
        for movie, word in zip(movies, words, strict=True):
            if not movie or not word or not word.strip():
                unusable += 1
                continue
            tags.setdefault(movie, {}).setdefault(word.strip().casefold(), word.strip())
    if unusable:
        log.warning("movielens: %s unreadable or empty rows of tags.csv were left out", f"{unusable:,}")
    return {movie: ", ".join(words.values()) for movie, words in tags.items()}


def _read_movies(file: TableFile, settings: MovieLensSettings, shared: Any) -> Iterator[pa.Table]:
    import ray

    posters, tags = ray.get(shared)
    for raw in read_batches(file, _COLUMNS["movies.csv"], _BATCH):
        yield _movies(raw, posters, tags, settings.posters_only)


def _movies(raw: pa.Table, posters: Mapping[str, str], tags: Mapping[str, str], posters_only: bool) -> pa.Table:
    if "movieId" not in raw.column_names:  # rows that could not be read
        return raw_notes(raw)
    ids = to_text(raw["movieId"]).values.to_pylist()
    genres = to_text(raw["genres"]).values
    genres = pc.if_else(pc.equal(genres, NO_GENRES), "", genres)
    table = raw.drop_columns("genres").rename_columns({"movieId": "note_id"}).append_column("topics", genres)
    table = table.append_column("content", pa.array([tags.get(movie or "", "") for movie in ids], pa.string()))
    table = table.append_column("image", pa.array([posters.get(movie or "") for movie in ids], pa.string()))
    notes = raw_notes(table)
    if not posters_only:
        return notes
    return notes.filter(pc.or_(pc.is_valid(notes["image"]), _unusable_id(notes)))


def _unusable_id(rows: pa.Table) -> pa.ChunkedArray:
    """Rows whose movie cannot be told: they are kept, to be quarantined."""
    return pc.or_(pc.is_valid(rows["_error"]), pc.fill_null(pc.equal(rows["note_id"], ""), True))


def _read_ratings(file: TableFile, settings: MovieLensSettings, shared: Any) -> Iterator[pa.Table]:
    import ray

    known = pa.array(ray.get(shared)[0].keys(), pa.string()) if settings.posters_only else None
    for raw in read_batches(file, _COLUMNS["ratings.csv"], _BATCH):
        yield _events(raw, settings.click_rating, known)


def _events(raw: pa.Table, click_rating: float, known: pa.Array | None) -> pa.Table:
    if "movieId" not in raw.column_names:
        return raw_events(raw)
    rating = _ratings(to_text(raw["rating"]).values)
    table = raw.rename_columns({"userId": "user_id", "movieId": "note_id"})
    table = table.append_column("action", pa.array(["view"] * raw.num_rows, pa.string()))
    views = _with_problems(raw_events(table), rating)
    clicked = pc.fill_null(pc.greater_equal(rating.values, click_rating), False)
    if known is not None:
        kept = pc.or_(pc.is_in(views["note_id"], value_set=known), _unusable_id(views))
        views, clicked = views.filter(kept), clicked.filter(kept.combine_chunks())
    return _with_clicks(views, clicked.to_numpy(zero_copy_only=False))


def _ratings(text: pa.Array) -> Column:
    try:
        return Column(text.cast(pa.float64()), {})
    except pa.ArrowInvalid:
        pass
    values: list[float | None] = []
    problems: dict[int, str] = {}
    for row, value in enumerate(text.to_pylist()):
        try:
            values.append(float(value or ""))
        except ValueError:
            values.append(None)
            problems[row] = f"{WRONG_VALUE}: rating {show(value)} is not a number"
    return Column(pa.array(values, pa.float64()), problems)


def _with_problems(views: pa.Table, rating: Column) -> pa.Table:
    if not rating.problems:
        return views
    errors = [old or rating.problems.get(row) for row, old in enumerate(views["_error"].to_pylist())]
    return views.set_column(views.column_names.index("_error"), "_error", pa.array(errors, pa.string()))


def _with_clicks(views: pa.Table, clicked: np.ndarray) -> pa.Table:
    """Each view, followed by its click where ``clicked`` ``(N,)`` is true; a row with an error stays one row."""
    clicked = clicked & views["_error"].is_null().to_numpy()
    of = np.repeat(np.arange(views.num_rows), 1 + clicked)
    is_click = np.zeros(len(of), dtype=bool)
    is_click[1:] = of[1:] == of[:-1]
    rows = views.take(of)
    later = np.where(is_click, CLICK_DELAY_US, 0)
    time = flat(rows["timestamp"])
    moved = pc.add(time.cast(pa.int64()), pa.array(later)).cast(time.type)
    action = pa.array(np.where(is_click, "click", "view"), pa.string())
    names = rows.column_names
    return rows.set_column(names.index("timestamp"), "timestamp", moved).set_column(
        names.index("action"), "action", action
    )


def movielens_versions(settings: MovieLensSettings) -> dict[str, Version]:
    """The tables, and the names of the posters: with ``posters_only`` they decide which movies are notes."""
    tables = [settings.directory / name for name in ("ratings.csv", "movies.csv")]
    tags = settings.directory / "tags.csv"  # the only table that may be absent
    return {
        "source.directory": [file_version(path) for path in [*tables, *([tags] if tags.is_file() else [])]],
        "source.directory/posters": image_version(poster_files(settings)),
    }


SOURCE = Source(
    settings=MovieLensSettings, read=movielens_tables, versions=movielens_versions, has_creation_times=False
)
