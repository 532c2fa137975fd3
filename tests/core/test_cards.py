"""Starts on one GPU follow each other; on different GPUs they do not wait."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from notellm2_ray.core.cards import visible_cards
from tests.support import ROOT

# Starts on the cards that it sees, and writes in a ledger when the start began and when it ended.
START = """
import os, sys, time
from pathlib import Path
from notellm2_ray.core.cards import only_start
directory, name = Path(sys.argv[1]), sys.argv[2]
(directory / f"{name}.there").touch()
while not (directory / "go").exists():
    time.sleep(0.01)
with only_start(directory):
    began = time.monotonic()
    time.sleep(0.3)
    (directory / f"{name}.ledger").write_text(f"{began} {time.monotonic()}")
"""


def ledger(directory: Path, **cards: str) -> dict[str, tuple[float, float]]:
    """When each process began and ended its start, given the cards that it sees."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(directory), name],
            env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": seen},
        )
        for name, seen in cards.items()
    ]
    while len(list(directory.glob("*.there"))) < len(cards):
        time.sleep(0.01)
    (directory / "go").touch()
    assert [one.wait(30) for one in running] == [0] * len(cards)
    times = {name: (directory / f"{name}.ledger").read_text().split() for name in cards}
    return {name: (float(began), float(ended)) for name, (began, ended) in times.items()}


def test_one_start_at_a_time_on_a_card(tmp_path: Path) -> None:
    found = ledger(tmp_path, ranker="0", writer="0", encoder="0,1", alone="2")
    shared = sorted(found[name] for name in ("ranker", "writer", "encoder"))
    assert all(ended <= began for (_, ended), (began, _) in pairwise(shared))
    assert found["alone"][0] < shared[1][0]


def test_a_start_that_fails_frees_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from notellm2_ray.core.cards import only_start

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b/2, 0")
    assert visible_cards() == ["0", "GPU-1b2"]
    for _ in range(2):
        with pytest.raises(MemoryError), only_start(tmp_path):
            raise MemoryError
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_cards() == ["all"]
