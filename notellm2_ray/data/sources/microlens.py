"""MicroLens as a source: users' sequences of short videos, each video's title, and its cover if there is one.

https://github.com/westlake-repl/MicroLens
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.sources import Source, SourceSettings, Version
from notellm2_ray.data.columns import to_text
from notellm2_ray.data.rows import UNREADABLE_ROW, raw_events, raw_notes
from notellm2_ray.data.sources import SourceTables
from notellm2_ray.data.sources.files import TableFile, dataset, file_version, image_names, image_version, ref_to
from notellm2_ray.data.sources.formats import column_names, read_batches

# A sequence file has an order but no times: a user's event number n gets the time n seconds after this moment.
SEQUENCE_START = datetime(2020, 1, 1, tzinfo=UTC)
ACTION = "click"  # of every interaction: each is a comment, which is more than a view

_BATCH = 20_000


class MicroLensSettings(SourceSettings):
    """MicroLens: a pairs file of item sequences and a titles file; covers if you have them."""

    kind: Literal["microlens"]
    pairs: Path = Field(description="the ..._pairs.tsv (sequences) or ..._pairs.csv (user,item,timestamp) file")
    titles: Path = Field(description="the ..._titles.csv file (item,title)")
    covers: Path | None = Field(None, description="folder of cover images named ITEM.jpg; null: no images")


def microlens_tables(settings: MicroLensSettings, seed: int = 0) -> SourceTables:
    """Notes are the titles file's videos; events are the pairs file's interactions, all of them clicks.

    Raises:
        DataError: a file is missing or is not laid out as MicroLens's are.
    """
    titles = _file(settings.titles, "source.titles", "csv")
    sequences = _invented_times(settings)
    pairs = _file(settings.pairs, "source.pairs", "tsv" if sequences else "csv")
    _check_titles(titles)
    if not sequences:
        _check_pairs(pairs)
    covers = ref_to(image_names(settings.covers, "source.covers") if settings.covers else {})
    return SourceTables(
        notes=dataset([titles], lambda file: _read_titles(file, covers)),
        events=dataset([pairs], _read_sequences if sequences else _read_pairs),
        invented_times=sequences,
    )


def _invented_times(settings: MicroLensSettings) -> bool:
    """Whether the pairs file holds sequences, which have an order and no times."""
    return settings.pairs.suffix.lower() == ".tsv"


def _file(path: Path, setting: str, format_: str) -> TableFile:
    if not path.is_file():
        raise DataError(f"{path}: no such file; set {setting}")
    return TableFile(os.path.abspath(path), format_)


def _check_titles(file: TableFile) -> None:
    present = column_names(file)
    missing = [name for name in ("item", "title") if name not in present]
    if missing:
        raise DataError(
            f"{file.path}: missing column {missing[0]!r}; its columns are {', '.join(present)}. source.titles must be "
            "MicroLens's titles file, whose first line is item,title"
        )


def _check_pairs(file: TableFile) -> None:
    present = column_names(file)
    if len(present) != 3 or present[2].strip().isdigit():
        raise DataError(
            f"{file.path}: its first line is {','.join(present)!r}; source.pairs must be MicroLens's pairs file: .csv "
            "with a first line user,item,timestamp, or .tsv of sequences"
        )


def hashtags(title: str) -> list[str]:
    """The tags in a title: from one ``#`` to the next, or to the end, because translated tags are phrases."""
    tags = (part.strip(" \t\r\n,.;:!?，。；：！？") for part in title.split("#")[1:])
    return list(dict.fromkeys(tag for tag in tags if tag))


def _read_titles(file: TableFile, covers: Any) -> Iterator[pa.Table]:
    import ray

    paths: Mapping[str, str] = ray.get(covers)
    for raw in read_batches(file, ("item", "title"), _BATCH):
        if "item" not in raw.column_names:
            yield raw_notes(raw)
            continue
        titles = to_text(raw["title"]).values.to_pylist()
        items = to_text(raw["item"]).values.to_pylist()
        topics = pa.array([hashtags(title or "") for title in titles], pa.list_(pa.string()))
        images = pa.array([paths.get(item) for item in items], pa.string())
        named = raw.rename_columns({"item": "note_id"})
        yield raw_notes(named.append_column("topics", topics).append_column("image", images))


def _read_pairs(file: TableFile) -> Iterator[pa.Table]:
    user, item, time = column_names(file)
    for raw in read_batches(file, (user, item, time), _BATCH):
        if user not in raw.column_names:
            yield raw_events(raw)
            continue
        named = raw.rename_columns({user: "user_id", item: "note_id", time: "timestamp"})
        yield raw_events(named.append_column("action", _actions(raw.num_rows)))


def _actions(num_rows: int) -> pa.Array:
    return pa.array([ACTION] * num_rows, pa.string())


def _read_sequences(file: TableFile) -> Iterator[pa.Table]:
    """Lines ``user<TAB>item item item``; each item becomes an event."""
    users: list[str] = []
    items: list[list[str]] = []
    rows: list[int] = []
    with open(file.path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for row, line in enumerate(lines, 1):
            user, tab, sequence = line.rstrip("\r\n").partition("\t")
            if tab and sequence.split() and _valid(line):
                users.append(user)
                items.append(sequence.split())
                rows.append(row)
            elif line.strip():
                problem = f"{UNREADABLE_ROW}: not of the form user<TAB>item item item: {line.strip()[:60]!r}"
                yield raw_events(pa.table({"_source": pa.array([f"{file.path}:{row}"]), "_error": pa.array([problem])}))
            if len(users) >= _BATCH // 4:
                yield _unrolled(file.path, users, items, rows)
                users, items, rows = [], [], []
    yield _unrolled(file.path, users, items, rows)


def _valid(line: str) -> bool:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # surrogateescape marks bytes that are not UTF-8
        return False
    return True


def _unrolled(path: str, users: list[str], items: list[list[str]], rows: list[int]) -> pa.Table:
    lengths = np.array([len(sequence) for sequence in items], dtype=np.int64)
    of = np.repeat(np.arange(len(users)), lengths)
    place = np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    start = int(SEQUENCE_START.timestamp())
    source = pc.binary_join_element_wise(pa.scalar(path), pa.array(rows, pa.int64()).cast(pa.string()), ":")
    return raw_events(
        pa.table(
            {
                "user_id": pa.array(users, pa.string()).take(of),
                "note_id": pa.array([item for sequence in items for item in sequence], pa.string()),
                "timestamp": pa.array(start + place, pa.int64()),
                "action": _actions(len(of)),
                "_source": source.take(of),
            }
        )
    )


def microlens_versions(settings: MicroLensSettings) -> dict[str, Version]:
    """Both files, and the names of the covers."""
    versions = {"source.pairs": [file_version(settings.pairs)], "source.titles": [file_version(settings.titles)]}
    if settings.covers:
        versions["source.covers"] = image_version(image_names(settings.covers, "source.covers"))
    return versions


SOURCE = Source(
    settings=MicroLensSettings,
    read=microlens_tables,
    versions=microlens_versions,
    has_creation_times=False,
    invented_times=_invented_times,
)
