"""Killing engines and drivers while they generate: finished work is kept, not repeated, and the result is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.schema import BLOCK_SCHEMA, NOTE_SCHEMA
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings, SummarySettings
from notellm2_ray.infer.preferences import summarize_preferences
from notellm2_ray.infer.summaries import summarize_images
from tests.support import ROOT
from tests.support.processes import command, descendants, end_family, processes, wait_until
from tests.support.tiny_mllm import picture, save_mllm

pytestmark = pytest.mark.slow
GENERATION = GenerationSettings(dtype="float32", max_model_len=768, max_sequences=8)
PREFERENCES = PreferenceSettings(max_tokens=32, concurrent_calls=4)
SUMMARIES = SummarySettings(
    max_tokens=32, batch_rows=4, concurrent_batches=2, temperature=1.0, min_characters=0, max_bad_share=1.0
)
NUM_USERS, NUM_IMAGES = 40, 120
TITLES = {f"n{i}": f"title number {i} red sofa" for i in range(60)}
DRIVER = """
import sys
from pathlib import Path
from notellm2_ray.core.cluster import connect
from notellm2_ray.core.settings import RaySettings
from tests.infer import test_generation_kills as job

connect(RaySettings(num_cpus=4, object_store_gb=0.2))
getattr(job, sys.argv[1])(*map(Path, sys.argv[2:]))
"""


def describe(model: Path, data: Path, output: Path) -> dict:
    return summarize_images(model, data, output, SUMMARIES, GENERATION, "en")


def summarise(model: Path, data: Path, output: Path) -> dict:
    return summarize_preferences(model, data, TITLES, None, output, PREFERENCES, GENERATION, "en", seed=1)


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_mllm(tmp_path_factory.mktemp("mllm")))


def test_killed_preferences_are_continued(tmp_path: Path, ray_cluster, mllm: Path) -> None:
    rows = [
        {
            "user_id": f"u{user:02d}",
            "block": block,
            "note_ids": [f"n{(7 * user + 3 * block + i) % 60}" for i in range(3)],
        }
        for user in range(NUM_USERS)
        for block in range(1 + user % 7)
    ]
    blocks = tmp_path / "blocks.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA), blocks)

    def committed(output: Path) -> Counter[str]:
        lines = (line for path in output.glob("log-*.jsonl") for line in path.read_bytes().splitlines(keepends=True))
        return Counter(json.loads(line)["key"] for line in lines if line.endswith(b"\n"))

    output, kept = tmp_path / "killed", Counter[str]()
    kill_engine_then_driver("summarise", [mllm, blocks, output], is_preference_engine, committed, kept)
    assert 20 <= len(kept) < len(rows)
    counts = summarise(mllm, blocks, output)
    after = committed(output)
    assert counts["reused"] >= len(kept) and len(after) == counts["preferences"] == len(rows)
    assert all(after[key] == 1 for key in kept), "a preference that was on disk was asked for again"
    summarise(mllm, blocks, tmp_path / "undisturbed")
    expected = pq.read_table(tmp_path / "undisturbed" / "preferences.parquet")
    assert pq.read_table(output / "preferences.parquet").equals(expected)


@pytest.mark.skipif(
    "NOTELLM2_LONG_TESTS" not in os.environ,
    reason="starts six engines, six minutes: set NOTELLM2_LONG_TESTS=1 to run it",
)
def test_killed_summaries_are_continued(tmp_path: Path, ray_cluster, mllm: Path) -> None:
    notes = [
        {"note_id": f"n{i:03d}", "title": "", "topics": [], "content": "", "image": picture(i), "created_at": None}
        for i in range(NUM_IMAGES)
    ]
    path = tmp_path / "notes.parquet"
    pq.write_table(pa.Table.from_pylist(notes, schema=NOTE_SCHEMA), path)

    def committed(output: Path) -> Counter[str]:
        parts = (output / "parts").glob("*.parquet")
        return Counter(key for part in parts for key in pq.read_table(part)["note_id"].to_pylist())

    output, kept = tmp_path / "killed", Counter[str]()
    kill_engine_then_driver("describe", [mllm, path, output], has_engine_below, committed, kept)
    assert 20 <= len(kept) < NUM_IMAGES
    counts = describe(mllm, path, output)
    after = committed(output)
    assert counts["reused"] >= len(kept) and all(after[key] == 1 for key in kept)
    assert set(after.values()) == {1}, "an image was described twice"
    describe(mllm, path, tmp_path / "undisturbed")
    expected = pq.read_table(tmp_path / "undisturbed" / "summaries.parquet")
    assert pq.read_table(output / "summaries.parquet").equals(expected)


def kill_engine_then_driver(
    job: str,
    paths: list[Path],
    is_engine: Callable[[int], bool],
    committed: Callable[[Path], Counter[str]],
    kept: Counter[str],
) -> None:
    """Run a job in a process of its own; kill its engine's actor early, and itself later. Fills ``kept``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", DRIVER, job, *map(str, paths)]
    driver = subprocess.Popen(arguments, start_new_session=True, env=environment)
    family: list[int] = []

    def wait_for(count: int) -> None:
        wait_until(lambda: driver.poll() is not None or len(committed(paths[-1])) >= count, seconds=400)
        assert driver.poll() is None, "the driver ended by itself"

    try:
        wait_for(8)
        engines = [pid for pid in descendants(driver.pid) if is_engine(pid)]
        assert len(engines) == 1
        orphans = descendants(engines[0])
        os.kill(engines[0], signal.SIGKILL)
        before = len(committed(paths[-1]))
        wait_for(max(20, before + 4))
        wait_until(lambda: not {pid for pid, _ in processes()} & set(orphans), seconds=30)
        family = descendants(driver.pid)
    finally:
        family = family or descendants(driver.pid)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        end_family(family)
    time.sleep(0.5)
    kept.update(committed(paths[-1]))


def is_preference_engine(pid: int) -> bool:
    """An actor that holds its engine itself."""
    return "PreferenceEngine" in command(pid)


def has_engine_below(pid: int) -> bool:
    """An actor of Ray Data's own stage, whose engine is a process of its own."""
    return "MapWorker" in command(pid) and any("EngineCore" in command(child) for child in descendants(pid))
