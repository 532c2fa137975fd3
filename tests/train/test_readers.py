"""Features made in processes are the same, in the same order; errors come through, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.train.history import Stopwatch
from notellm2_ray.train.readers import num_readers
from tests.support import embedder_training as material


@pytest.mark.slow
def test_batches_from_processes_are_the_same_to_the_bit(tmp_path):
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.train.batches import NotePreparer, prefetched

    directory = material.write(tmp_path)
    paths = {"llm_path": str(directory / "llm"), "vision_path": str(directory / "clip")}
    encoder = build_encoder(material.model_settings(), 1, **paths)
    notes = [note._replace(image=b"no image") if i == 5 else note for i, note in enumerate(material.notes())]
    NoteStore.write(tmp_path / "notes.arrow", [material.as_batch(notes)])
    ids = [f"n{i}" for i in (*range(5), *range(6, 24))]
    batches = [ids, ids[::-1], ids[3:9]]

    def prepared(readers: int) -> list[list[torch.Tensor]]:
        prepare = NotePreparer(NoteStore(tmp_path / "notes.arrow"), encoder.preprocessor, 2, readers=readers)
        made = [
            [part.positions, *(tensor for group in part.groups for tensor in group)]
            for part in prefetched(prepare, batches, 2)
        ]
        with pytest.raises(DataError, match="^note n5: "):
            prepare(["n1", "n5"])
        prepare.readers.close()
        return made

    for alone, beside in zip(prepared(0), prepared(2), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


_RANK = """
import time
from notellm2_ray.train.readers import Readers
if __name__ == "__main__":
    readers = Readers(str.upper, 2)
    assert readers(["a"] * 40) == ["A"] * 40
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_readers_end_with_a_rank_that_is_killed(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(_RANK, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        children = psutil.Process(rank.pid).children(recursive=True)
        assert len(children) >= 2
        rank.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_readers_suit_device_and_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(52)), raising=False)
    gpu, settings = torch.device("cuda", 0), material.train_settings()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert num_readers(settings, gpu) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_readers(settings, gpu) == 5
    assert num_readers(material.train_settings(cpus_per_worker=4), gpu) == 3
    assert num_readers(settings, torch.device("cpu")) == 0
    assert num_readers(material.train_settings(readers=3), torch.device("cpu")) == 3


def test_waiting_for_input_is_measured():
    def slowly():
        for step in range(3):
            time.sleep(0.05)
            yield step

    stopwatch = Stopwatch(8)
    for _ in stopwatch.waiting(slowly()):
        stopwatch.begin()
        time.sleep(0.1)
        stopwatch.end()
    assert 0.15 < stopwatch.waiting_share < 0.4  # 0.1 of 0.4 seconds; the first step's do not count
