"""A tiny embedder on disk, and notes tables to go with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.schema import NOTE_SCHEMA, Note


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random tiny NoteEncoder: ``.path`` its directory, ``.encoder`` itself as read back from there."""
    from models import fixtures

    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.models.embedder.encoder import NoteEncoder

    base = tmp_path_factory.mktemp("embedder")
    paths = {"llm_path": fixtures.save_llm(base / "llm"), "vision_path": fixtures.save_clip(base / "clip")}
    build_encoder(fixtures.settings(), 0, **paths).save_pretrained(base / "model")
    return SimpleNamespace(path=base / "model", encoder=NoteEncoder.from_pretrained(base / "model"))


def write_notes(path: Path, notes: Sequence[Note], row_group_size: int = 1000) -> Path:
    """Notes as a prepared Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**note._asdict(), "created_at": None} for note in notes]
    pq.write_table(pa.Table.from_pylist(rows, schema=NOTE_SCHEMA), path, row_group_size=row_group_size)
    return path


@pytest.fixture(name="write_notes", scope="session")
def write_notes_fixture():
    """:func:`write_notes`."""
    return write_notes
