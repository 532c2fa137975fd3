"""Reading beside the model: the same vectors and quarantine as in its own process, and a device that never waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.index.table import read_vectors
from notellm2_ray.infer.chunks import list_note_files, plan_chunks
from notellm2_ray.infer.embed import embed_notes
from notellm2_ray.infer.embed_reading import ChunkReader, EmbedJob, Reading, num_readers
from notellm2_ray.infer.embed_worker import ChunkEmbedder, Loaded, embedded_parts
from notellm2_ray.infer.parts import MAX_ATTEMPTS
from notellm2_ray.models.embedder.encoder import NoteEncoder
from tests.support import tiny_models
from tests.support.tiny_models import write_notes

SETTINGS = EmbedSettings(batch_tokens=512, max_batch_notes=7)


def make_job(tmp_path: Path, embedder, **changes) -> EmbedJob:
    embedded_parts(tmp_path / "out").clear_leftovers([])
    columns = {"embedding": "multimodal", "embedding_text": "text"}
    return EmbedJob(str(embedder.path), str(tmp_path / "out"), columns, None, SETTINGS.model_copy(update=changes))


def rows_of(path: Path, chunk_rows: int = 1000) -> list[pa.Table]:
    chunks = plan_chunks(list_note_files(path), chunk_rows, "m").chunks
    return [pa.Table.from_pylist([chunk._asdict()]) for chunk in chunks]


def test_a_reader_hands_over_what_the_actor_reads_itself(tmp_path: Path, embedder, monkeypatch) -> None:
    notes = tiny_models.notes(30, without_image=[3])
    notes[8] = notes[8]._replace(image=b"no image")
    (row,) = rows_of(write_notes(tmp_path / "n.parquet", notes))
    job = make_job(tmp_path, embedder)
    (own,) = ChunkEmbedder(job)(row).to_pylist()
    parts = embedded_parts(tmp_path / "out")
    expected, quarantine = parts.rows(own["part_id"]), parts.quarantined(own["part_id"])
    parts.path(own["part_id"]).unlink()

    read = ChunkReader(job)(row)
    monkeypatch.setattr(Reading, "__call__", lambda self, chunk: pytest.fail("it was read a second time"))
    (handed,) = ChunkEmbedder(job)(read).to_pylist()
    assert handed == own and (handed["embedded"], handed["quarantined"]) == (29, 1)
    assert parts.rows(own["part_id"]).equals(expected) and parts.quarantined(own["part_id"]).equals(quarantine)


def test_what_stops_a_reader_is_reported_with_the_part(tmp_path: Path, embedder) -> None:
    path = write_notes(tmp_path / "n.parquet", tiny_models.notes(5))
    (row,) = rows_of(path)
    job = make_job(tmp_path, embedder)
    path.rename(tmp_path / "elsewhere.parquet")
    (report,) = ChunkEmbedder(job)(ChunkReader(job)(row)).to_pylist()
    assert report["error"] == "DataError" and "n.parquet, rows 0 to 5" in report["message"]


def test_a_chunk_that_keeps_killing_its_reader_ends_the_job(tmp_path: Path, embedder) -> None:
    (row,) = rows_of(write_notes(tmp_path / "n.parquet", tiny_models.notes(5)))
    job = make_job(tmp_path, embedder)
    for _ in range(MAX_ATTEMPTS):
        embedded_parts(tmp_path / "out").begin_attempt(f"{row['part_id'][0]}-read")
    (report,) = ChunkEmbedder(job)(ChunkReader(job)(row)).to_pylist()
    assert report["error"] == "ModelError" and "4 readers died" in report["message"]


class GatedEncoder(NoteEncoder):
    """On a device that ends its work only when it is told to."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def __init__(self, encoder: NoteEncoder) -> None:
        super().__init__(encoder.model, encoder.preprocessor)
        self.launched = threading.Semaphore(0)
        self.gate = threading.Event()

    def launch(self, features, length):
        self.launched.release()
        return len(features), length

    def fetch(self, launched):
        assert self.gate.wait(30), "the device was not told to end"
        return np.ones(launched, np.float32)


def test_a_gpu_has_the_next_chunk_while_the_last_one_is_fetched(tmp_path: Path, embedder, monkeypatch) -> None:
    job = make_job(tmp_path, embedder, gpus_per_actor=1, readers=1)._replace(columns={"embedding": "multimodal"})
    first, second = rows_of(write_notes(tmp_path / "n.parquet", tiny_models.notes(16), 8), 8)
    reader, encoder = ChunkReader(job), GatedEncoder(embedder.encoder)
    loaded = Loaded(encoder, "m", Reading(job, encoder.preprocessor))
    monkeypatch.setattr(ChunkEmbedder, "load", lambda self: loaded)
    actor = ChunkEmbedder(job)
    with ThreadPoolExecutor(2) as calls:
        done = [calls.submit(actor, reader(row)) for row in (first, second)]
        # Eight notes are two batches. All four are with the device before it has ended the first.
        launched = [encoder.launched.acquire(timeout=30) for _ in range(4)]
        encoder.gate.set()
        assert launched == [True] * 4
        assert [call.result().to_pylist()[0]["embedded"] for call in done] == [8, 8]


def test_gpus_get_the_cpus_that_the_actors_leave(monkeypatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 20.0, "GPU": 2.0})
    gpus = EmbedSettings(gpus_per_actor=1, actors=2, cpus_per_actor=2)
    assert num_readers(gpus, 2, 100) == 16
    assert num_readers(gpus.model_copy(update={"actors": 1}), 1, 100) == 16  # and not 18
    assert num_readers(gpus, 2, 3) == 3
    assert num_readers(gpus.model_copy(update={"cpus_per_actor": 10}), 2, 100) == 0
    assert num_readers(gpus.model_copy(update={"readers": 5}), 2, 100) == 5
    assert num_readers(EmbedSettings(), 1, 100) == 0


@pytest.mark.slow
def test_a_table_through_readers_is_in_order_and_the_same(tmp_path: Path, ray_cluster, embedder) -> None:
    notes = tiny_models.notes(60, without_image=[5])
    notes[7] = notes[7]._replace(image=b"no image")
    path = write_notes(tmp_path / "n.parquet", notes, 10)
    settings = SETTINGS.model_copy(update={"chunk_rows": 10, "readers": 1})
    inputs = ("text", "multimodal")
    counts = embed_notes(embedder.path, path, tmp_path / "out", settings, inputs=inputs)
    assert (counts["embedded"], counts["quarantined"], counts["chunks"]) == (59, 1, 6)
    job = make_job(tmp_path / "own", embedder)
    reports = [ChunkEmbedder(job)(row).to_pylist()[0] for row in rows_of(path, 10)]
    expected = pa.concat_tables(embedded_parts(tmp_path / "own" / "out").rows(one["part_id"]) for one in reports)
    for column in job.columns:
        ids, vectors = read_vectors(tmp_path / "out.lance", column)
        assert ids.tolist() == expected["note_id"].to_pylist()
        np.testing.assert_allclose(vectors, np.array(expected[column].to_pylist(), np.float32), atol=1e-6)
    assert (
        embed_notes(embedder.path, path, tmp_path / "out", settings, inputs=("text", "multimodal"))["chunks_reused"]
        == 6
    )
    assert not [one for one in (tmp_path / "out" / "parts").iterdir() if one.suffix != ".parquet"]
