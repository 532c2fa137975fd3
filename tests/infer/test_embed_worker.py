"""The encoder actor, called in this process: its vectors are the encoder's own, and failures are reported."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.infer import embed_worker
from notellm2_ray.infer.chunks import list_note_files, plan_chunks
from notellm2_ray.infer.embed_reading import EmbedJob
from notellm2_ray.infer.embed_worker import ChunkEmbedder, embedded_parts, encode
from notellm2_ray.infer.parts import MAX_ATTEMPTS, QUARANTINE
from tests.support import tiny_models
from tests.support.tiny_models import write_notes

SETTINGS = EmbedSettings(batch_tokens=512, max_batch_notes=7, preprocess_threads=2)


@pytest.fixture
def job(tmp_path: Path, embedder) -> EmbedJob:
    embedded_parts(tmp_path / "out").clear_leftovers([])  # makes the directories
    return EmbedJob(str(embedder.path), str(tmp_path / "out"), {"embedding": "multimodal"}, None, SETTINGS)


@pytest.fixture(autouse=True)
def _keep_process_settings():
    import sys

    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def report(actor: ChunkEmbedder, path: Path) -> tuple[dict, Path]:
    """The actor's answer on the whole of a notes file, and where its vectors lie."""
    chunk = plan_chunks(list_note_files(path), 1000, "m").chunks[0]
    (row,) = actor(pa.Table.from_pylist([chunk._asdict()])).to_pylist()
    return row, actor.parts.path(chunk.part_id)


def test_bulk_vectors_are_those_of_encode(tmp_path: Path, job: EmbedJob, embedder) -> None:
    notes = tiny_models.notes(40, without_image=[3, 11])
    columns = {"embedding": "multimodal", "embedding_image": "image", "embedding_text": "text"}
    row, path = report(ChunkEmbedder(job._replace(columns=columns)), write_notes(tmp_path / "n.parquet", notes))
    assert (row["embedded"], row["quarantined"], row["error"]) == (40, 0, None)
    assert row["model_fingerprint"] == embedder.encoder.fingerprint
    table = pq.read_table(path)
    assert table["note_id"].to_pylist() == [note.note_id for note in notes]
    for column, inputs in columns.items():
        found = np.array(table[column].to_pylist(), np.float32)
        expected = embedder.encoder.encode(notes, inputs, batch_tokens=512, max_batch_notes=7)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        one_by_one = np.concatenate([embedder.encoder.encode([note], inputs) for note in notes[:5]])
        np.testing.assert_allclose(found[:5], one_by_one, atol=2e-5)


def test_undecodable_image_is_quarantined_with_its_reason(tmp_path: Path, job: EmbedJob) -> None:
    notes = tiny_models.notes(6)
    notes[2] = notes[2]._replace(image=b"no image")
    notes[4] = notes[4]._replace(image=notes[4].image[:40])
    row, path = report(ChunkEmbedder(job), write_notes(tmp_path / "n.parquet", notes))
    assert (row["embedded"], row["quarantined"]) == (4, 2)
    (quarantine,) = (tmp_path / "out" / QUARANTINE).glob("*.parquet")
    rows = pq.read_table(quarantine).to_pylist()
    assert [entry["key"] for entry in rows] == ["n2", "n4"]
    assert all("n.parquet" in entry["source"] and entry["reason"] for entry in rows)
    assert pq.read_table(path)["note_id"].to_pylist() == ["n0", "n1", "n3", "n5"]


def spoil(monkeypatch: pytest.MonkeyPatch, rows: slice) -> None:
    def spoilt(*args):
        vectors = encode(*args)
        vectors[rows] = np.nan
        return vectors

    monkeypatch.setattr(embed_worker, "encode", spoilt)


def test_nan_vectors_are_quarantined(tmp_path: Path, job: EmbedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, slice(1, 3))
    row, path = report(ChunkEmbedder(job), write_notes(tmp_path / "n.parquet", tiny_models.notes(6)))
    assert (row["embedded"], row["quarantined"]) == (4, 2)
    assert pq.read_table(path)["note_id"].to_pylist() == ["n0", "n3", "n4", "n5"]
    (quarantine,) = (tmp_path / "out" / QUARANTINE).glob("*.parquet")
    assert {entry["reason"] for entry in pq.read_table(quarantine).to_pylist()} == {"its vector is NaN or infinite"}


def test_nothing_but_nan_is_the_models_fault(tmp_path: Path, job: EmbedJob, monkeypatch) -> None:
    spoil(monkeypatch, slice(None))
    row, path = report(ChunkEmbedder(job), write_notes(tmp_path / "n.parquet", tiny_models.notes(6)))
    assert row["error"] == "ModelError" and job.model in row["message"] and "NaN" in row["message"]
    assert not path.exists()


def test_a_finished_chunk_is_not_embedded_again(tmp_path: Path, job: EmbedJob) -> None:
    notes = write_notes(tmp_path / "n.parquet", tiny_models.notes(6))
    first, path = report(ChunkEmbedder(job), notes)
    before = path.stat()
    again, _ = report(ChunkEmbedder(job._replace(model="/gone")), notes)
    assert again == first
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_chunk_that_keeps_killing_its_actor_ends_the_job(tmp_path: Path, job: EmbedJob) -> None:
    path = write_notes(tmp_path / "n.parquet", tiny_models.notes(6))
    chunk = plan_chunks(list_note_files(path), 1000, "m").chunks[0]
    for attempt in range(MAX_ATTEMPTS):
        assert embedded_parts(tmp_path / "out").begin_attempt(chunk.part_id) == attempt + 1
    row, _ = report(ChunkEmbedder(job), path)
    assert row["error"] == "ModelError" and "actors died" in row["message"]


def test_errors_of_the_set_up_come_back_by_name(tmp_path: Path, job: EmbedJob, monkeypatch) -> None:
    notes = write_notes(tmp_path / "n.parquet", tiny_models.notes(3))
    (tmp_path / "other").mkdir()
    row, _ = report(ChunkEmbedder(job._replace(model=str(tmp_path / "other"))), notes)
    assert row["error"] == "ModelError" and "other" in row["message"]

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    row, path = report(ChunkEmbedder(job), notes)
    assert (row["error"], row["errno"]) == ("OSError", errno.ENOSPC)
    assert not path.exists() and not list(path.parent.glob("*.partial"))
    assert embedded_parts(tmp_path / "out").finished(row["part_id"]) is None
