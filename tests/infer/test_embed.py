"""Bulk embedding through Ray Data, from Parquet to the table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.index.table import read_vectors, table_info
from notellm2_ray.infer import embed
from notellm2_ray.infer.chunks import Chunk
from notellm2_ray.infer.embed import embed_notes, inputs_by_column, plan_job
from notellm2_ray.infer.embed_reading import EmbedJob
from notellm2_ray.infer.embed_worker import ChunkEmbedder, EmbeddedPart
from notellm2_ray.infer.part_actors import finished_of
from tests.support import tiny_models
from tests.support.tiny_models import write_notes

SETTINGS = EmbedSettings(actors=1, chunk_rows=10, batch_tokens=2048)


def test_notes_become_a_table_and_a_second_run_computes_nothing(tmp_path: Path, ray_cluster, embedder) -> None:
    notes = tiny_models.notes(55, without_image=[5])
    notes[7] = notes[7]._replace(image=b"no image")
    write_notes(tmp_path / "notes" / "a.parquet", notes[:30], 15)
    write_notes(tmp_path / "notes" / "b.parquet", notes[30:])
    pq.write_table(pa.table({"note_id": [note.note_id for note in notes[:52]] + ["gone"]}), tmp_path / "pool.parquet")
    context = ray_cluster.data.DataContext.get_current()
    before = (context.enable_progress_bars, context.default_map_logical_memory_enabled)

    def run() -> dict:
        return embed_notes(
            embedder.path,
            tmp_path / "notes",
            tmp_path / "v1.5-seed42",
            SETTINGS,
            inputs=("image", "multimodal"),
            only_ids=tmp_path / "pool.parquet",
        )

    counts = run()
    assert (counts["notes"], counts["embedded"], counts["quarantined"], counts["unknown_ids"]) == (52, 51, 1, 1)
    table = tmp_path / "v1.5-seed42.lance"
    assert table_info(table).model_fingerprint == embedder.encoder.fingerprint == counts["model_fingerprint"]
    expected = [note for i, note in enumerate(notes[:52]) if i != 7]
    for column, inputs in (("embedding", "multimodal"), ("embedding_image", "image")):
        ids, vectors = read_vectors(table, column)
        assert ids.tolist() == [note.note_id for note in expected]
        np.testing.assert_allclose(vectors, embedder.encoder.encode(expected, inputs), atol=2e-5)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "v1.5-seed42" / "parts").iterdir()}
    assert len(files) == counts["chunks"] and all(path.suffix == ".parquet" for path in files)

    again = run()
    assert again["chunks_reused"] == counts["chunks"] and again["quarantined"] == 1
    assert files == {path: path.stat().st_mtime_ns for path in files}
    now = ray_cluster.data.DataContext.get_current()
    assert now is context and (now.enable_progress_bars, now.default_map_logical_memory_enabled) == before


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks one after another in this process, by the very actor: what needs no cluster is tested without."""

    def run(job: EmbedJob, chunks: list[Chunk]) -> Generator[EmbeddedPart]:
        actor = ChunkEmbedder(job)
        for chunk in chunks:
            (row,) = actor(pa.Table.from_pylist([chunk._asdict()])).to_pylist()
            yield finished_of(row, EmbeddedPart)

    monkeypatch.setattr(embed, "run_chunks", run)


def test_too_many_bad_notes_stop_the_job(tmp_path: Path, in_process, embedder) -> None:
    notes = [note._replace(image=b"bad") if i % 2 else note for i, note in enumerate(tiny_models.notes(40))]
    path = write_notes(tmp_path / "n.parquet", notes)
    with pytest.raises(DataError, match=r"5 of the first 10 notes \(40 in all\).*max_bad_share=0.05.*reasons: note n1"):
        embed_notes(embedder.path, path, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out.lance").exists()
    patient = SETTINGS.model_copy(update={"max_bad_share": 0.5})
    counts = embed_notes(embedder.path, path, tmp_path / "out", patient)
    assert (counts["chunks_reused"], counts["embedded"], counts["quarantined"]) == (1, 20, 20)


def test_a_chunk_without_any_usable_note_only_leaves_a_gap(tmp_path: Path, in_process, embedder) -> None:
    notes = [note._replace(image=b"bad") if i < 10 else note for i, note in enumerate(tiny_models.notes(30))]
    path = write_notes(tmp_path / "n.parquet", notes)
    patient = SETTINGS.model_copy(update={"max_bad_share": 1.0})
    embed_notes(embedder.path, path, tmp_path / "out", patient)
    assert read_vectors(tmp_path / "out.lance")[0].tolist() == [note.note_id for note in notes[10:]]
    write_notes(path, notes[:10])
    with pytest.raises(DataError, match="no embeddings to write"):
        embed_notes(embedder.path, path, tmp_path / "none", patient)


def test_parts_of_another_model_are_not_reused(tmp_path: Path, in_process, embedder) -> None:
    path = write_notes(tmp_path / "n.parquet", tiny_models.notes(20))
    copy = shutil.copytree(embedder.path, tmp_path / "model")
    embed_notes(copy, path, tmp_path / "out", SETTINGS)
    os.utime(copy / "config.json", ns=(1, 1))  # as if it had been trained again
    counts = embed_notes(copy, path, tmp_path / "out", SETTINGS)
    assert counts["chunks_reused"] == 0
    assert len(list((tmp_path / "out" / "parts").iterdir())) == counts["chunks"] == 2


def test_parts_tell_the_sizes_of_batches_apart_and_not_how_they_were_set(tmp_path: Path, embedder) -> None:
    path = write_notes(tmp_path / "n.parquet", tiny_models.notes(5))

    def parts(**changes) -> list[str]:
        job = EmbedJob(str(embedder.path), "", inputs_by_column(("text",)), None, EmbedSettings(**changes))
        return [chunk.part_id for chunk in plan_job(job, path).chunks]

    assert parts() == parts(max_batch_notes=32, precision="fp32") != parts(max_batch_notes=256)
    on_gpu = {"gpus_per_actor": 1}
    assert parts(**on_gpu) == parts(**on_gpu, max_batch_notes=256) != parts(**on_gpu, max_batch_notes=32)
    assert parts(**on_gpu) != parts(max_batch_notes=256)  # in bfloat16


def test_an_absent_model_is_named(tmp_path: Path) -> None:
    path = write_notes(tmp_path / "n.parquet", tiny_models.notes(5))
    with pytest.raises(ModelError, match=f"{tmp_path / 'absent'}: there is no model directory"):
        embed_notes(tmp_path / "absent", path, tmp_path / "out", SETTINGS)


def test_actors_that_do_not_fit_are_refused(tmp_path: Path, ray_cluster, embedder) -> None:
    path = write_notes(tmp_path / "n.parquet", tiny_models.notes(30))
    greedy = SETTINGS.model_copy(update={"cpus_per_actor": 3, "actors": 2})
    with pytest.raises(ConfigError, match=r"embed\.actors or embed\.cpus_per_actor"):
        embed_notes(embedder.path, path, tmp_path / "out", greedy)


def test_each_vector_column_has_its_input() -> None:
    assert inputs_by_column(("text",)) == {"embedding": "text"}
    assert list(inputs_by_column(("text", "image", "multimodal")).items()) == [
        ("embedding", "multimodal"),
        ("embedding_image", "image"),
        ("embedding_text", "text"),
    ]
    for wrong in ((), ("text", "text"), ("picture",)):
        with pytest.raises(ConfigError, match="multimodal, image, text"):
            inputs_by_column(wrong)
