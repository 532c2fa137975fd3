"""Whole runs through Ray Train: their output, and that killing a worker or the driver does not change it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.train.embedder import train_embedder
from notellm2_ray.train.history import read_history
from tests.support import ROOT
from tests.support import embedder_training as material
from tests.support.processes import end_family

pytestmark = pytest.mark.slow
TOTAL = 80


def _train(directory: Path, output: Path, **changes: Any) -> dict[str, Any]:
    output.mkdir(exist_ok=True)
    settings = {
        "engine": "deepspeed",
        "zero_stage": 1,
        "num_workers": 2,
        "epochs": TOTAL // 5,
        "validate_every_steps": 30,
        "checkpoint_every_steps": 10,
    }
    return train_embedder(
        material.model_settings(dropout=0.2),
        material.train_settings(**{**settings, **changes}),
        1,
        pairs=directory / "pairs",
        llm_path=str(directory / "llm"),
        vision_path=str(directory / "clip"),
        output=output,
    )


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> Path:
    return material.write(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, trained_on, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed")
    return output, _train(trained_on, output)


def _same_training(output: Path, reference: Path) -> None:
    """Same losses, each step once, and the same model."""
    rows, expected = read_history(output / "history.jsonl"), read_history(reference / "history.jsonl")
    for row in (*rows, *expected):
        row.pop("notes_per_s", None)
    assert rows == expected
    model, published = output / "model" / "model.safetensors", reference / "model" / "model.safetensors"
    assert model.read_bytes() == published.read_bytes()


def test_a_run_leaves_the_best_model_and_its_history(undisturbed):
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from tests.support import tiny_models

    output, counts = undisturbed
    assert {path.name for path in output.iterdir()} == {"model", "history.jsonl", "training.json"}
    rows = read_history(output / "history.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, TOTAL + 1))
    validations = {row["step"]: row["valid_recall"] for row in rows if "valid_recall" in row}
    assert set(validations) == {30, 60, 80}
    assert counts["steps"] == TOTAL and counts["pairs"] == 40
    assert counts["best_recall"] == validations[counts["best_step"]] == max(validations.values())
    vectors = NoteEncoder.from_pretrained(output / "model").encode(tiny_models.notes(3))
    assert vectors.shape == (3, 16)


def test_a_finished_run_is_not_run_again(undisturbed, trained_on):
    output, counts = undisturbed
    began = time.monotonic()
    assert _train(trained_on, output) == counts
    assert time.monotonic() - began < 1


def _when_step(output: Path, step: int, act: Callable[[], None]) -> threading.Thread:
    """Run ``act`` in a thread once the run has taken ``step`` steps."""

    def watch() -> None:
        while len(read_history(output / "history.jsonl")) < step:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _workers_of(driver: int) -> list[psutil.Process]:
    """The training workers of the cluster that a process has started; nobody else's."""
    family = psutil.Process(driver).children(recursive=True)
    return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]


def test_a_killed_worker_changes_nothing(undisturbed, trained_on, tmp_path):
    killed: list[int] = []

    def kill() -> None:
        killed.append(len(read_history(tmp_path / "history.jsonl")))
        _workers_of(os.getpid())[-1].send_signal(signal.SIGKILL)

    thread = _when_step(tmp_path, 33, kill)
    _train(trained_on, tmp_path, background_checkpoints=True)
    thread.join()
    assert 33 <= killed[0] < TOTAL
    _same_training(tmp_path, undisturbed[0])


def test_a_killed_driver_costs_only_the_steps_since_its_checkpoint(undisturbed, trained_on, tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.train.test_launch import _train; "
        "_train(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    with open(tmp_path.with_suffix(".log"), "w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", program, str(trained_on), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "."},
            stdout=log,
            stderr=log,
        )
        family: list[psutil.Process] = []

        def kill() -> None:
            family.extend(_workers_of(driver.pid))
            driver.kill()

        _when_step(tmp_path, 18, kill).join()
        driver.wait()
        end_family([process.pid for process in family])
    steps = len([row for row in read_history(tmp_path / "history.jsonl") if "loss" in row])
    assert 17 <= steps < TOTAL
    assert not (tmp_path / "model").exists()
    _train(trained_on, tmp_path)
    _same_training(tmp_path, undisturbed[0])


def _pairs_but(trained_on: Path, directory: Path, missing: str) -> Path:
    """A copy of the training set without one of its files."""
    pairs = directory / "pairs"
    pairs.mkdir()
    for path in (trained_on / "pairs").iterdir():
        if path.name != missing:
            (pairs / path.name).symlink_to(path)
    for name in ("llm", "clip"):
        (directory / name).symlink_to(trained_on / name)
    return pairs


def test_too_few_pairs_are_found_before_anything_is_started(trained_on, tmp_path):
    pairs = _pairs_but(trained_on, tmp_path, "train.parquet")
    table = pq.read_table(trained_on / "pairs" / "train.parquet")
    pq.write_table(table.slice(0, 7), pairs / "train.parquet")
    with pytest.raises(DataError, match="7 training pairs do not fill one batch of train.batch_pairs=8"):
        _train(tmp_path, tmp_path / "output")


def test_an_error_of_a_worker_that_is_the_users_is_raised_as_it_is(ray_cluster, trained_on, tmp_path):
    pairs = _pairs_but(trained_on, tmp_path, "train_notes.arrow")
    notes = [note._replace(image=b"no image") for note in material.notes()]
    NoteStore.write(pairs / "train_notes.arrow", [material.as_batch(notes)])
    with pytest.raises(DataError, match=r"note n\d+: "):
        _train(tmp_path, tmp_path / "output", num_workers=1, engine="plain", zero_stage=0)


def test_a_cluster_that_is_too_small_is_refused(ray_cluster, trained_on, tmp_path):
    with pytest.raises(ConfigError, match=r"needs 1000 CPUs.*train.cpus_per_worker"):
        _train(trained_on, tmp_path, cpus_per_worker=500)
