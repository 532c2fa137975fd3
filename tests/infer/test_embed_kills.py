"""Killing the processes of a running job: the finished parts stay, and the table equals that of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.index.table import read_vectors
from notellm2_ray.infer.embed import embed_notes
from tests.support import tiny_models
from tests.support.processes import command, descendants, end_family, wait_until
from tests.support.tiny_models import write_notes

SETTINGS = EmbedSettings(actors=1, chunk_rows=40, batch_tokens=1024, max_batch_notes=8)
NUM_CHUNKS = 26
DRIVER = """
import sys
from pathlib import Path
from notellm2_ray.core.cluster import connect
from notellm2_ray.core.settings import EmbedSettings, RaySettings
from notellm2_ray.infer.embed import embed_notes

model, notes, output, settings = sys.argv[1:]
connect(RaySettings(num_cpus=4, object_store_gb=0.2))
embed_notes(model, notes, Path(output), EmbedSettings.model_validate_json(settings))
"""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes") / "notes.parquet"
    return write_notes(path, tiny_models.notes(NUM_CHUNKS * SETTINGS.chunk_rows), 80)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_cluster, embedder, notes: Path) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    embed_notes(embedder.path, notes, output, SETTINGS)
    return output.with_suffix(".lance")


@pytest.mark.slow
def test_a_killed_actor_costs_only_the_chunks_being_embedded(
    tmp_path: Path, ray_cluster, embedder, notes: Path, undisturbed: Path
) -> None:
    output, seen = tmp_path / "out", {}

    def kill() -> None:
        wait_until(lambda: len(finished_parts(output)) >= 5)
        actors = [pid for pid in descendants(os.getpid()) if "ChunkEmbedder" in command(pid)]
        seen["actors"], seen["parts"] = len(actors), finished_parts(output)
        for pid in actors:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    counts = embed_notes(embedder.path, notes, output, SETTINGS)
    killer.join()
    assert seen["actors"] == 1 and 5 <= len(seen["parts"]) < NUM_CHUNKS
    assert counts["embedded"] == NUM_CHUNKS * SETTINGS.chunk_rows
    assert_kept_and_equal(output, seen["parts"], undisturbed)


@pytest.mark.slow
def test_a_killed_driver_is_continued(tmp_path: Path, ray_cluster, embedder, notes: Path, undisturbed: Path) -> None:
    output = tmp_path / "out"
    arguments = [str(embedder.path), str(notes), str(output), SETTINGS.model_dump_json()]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], start_new_session=True)
    family: list[int] = []
    try:
        wait_until(lambda: driver.poll() is not None or len(finished_parts(output)) >= 5)
        assert driver.poll() is None, "the driver ended by itself"
        family = descendants(driver.pid)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        end_family(family)
    kept = finished_parts(output)
    assert 5 <= len(kept) < NUM_CHUNKS and not output.with_suffix(".lance").exists()
    counts = embed_notes(embedder.path, notes, output, SETTINGS)
    assert (counts["chunks_reused"], counts["chunks"]) == (len(kept), NUM_CHUNKS)
    assert_kept_and_equal(output, kept, undisturbed)


def assert_kept_and_equal(output: Path, kept: dict[str, tuple[int, int]], undisturbed: Path) -> None:
    """The parts that were finished at the kill were not written again, and the tables are equal bit for bit."""
    after = finished_parts(output)
    assert len(after) == NUM_CHUNKS and {name: after[name] for name in kept} == kept
    assert len(list((output / "parts").iterdir())) == NUM_CHUNKS, "what the kill cut short was not tidied up"
    ids, vectors = read_vectors(output.with_suffix(".lance"))
    expected_ids, expected = read_vectors(undisturbed)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_array_equal(vectors, expected)


def finished_parts(output: Path) -> dict[str, tuple[int, int]]:
    """Name to inode and time of writing of the finished parts."""
    paths = (output / "parts").glob("*.parquet") if output.exists() else ()
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
