"""Runs recall and ranking in two processes: once the notes are prepared, neither needs the other."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from notellm2_ray.core.config import apply_overrides, to_plain
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.ranking_outputs import needs_tiny_embedder_parts

log = logging.getLogger("notellm2_ray")

HALVES = ("run-retrieval", "run-ranking")
_PR_SET_PDEATHSIG = 1


def run_halves(settings: Settings, workspace: Path) -> None:
    """Run both halves, each with its own Ray, or both in the cluster of RAY_ADDRESS.

    Their progress goes to standard error at once; their tables are printed whole, one half after the other. A half that
    fails does not stop the other. On one machine with GPUs they run one after the other, because each of them would
    claim all GPUs.

    Raises:
        OutputError: a half failed; it has printed the reason.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    together = side_by_side(settings)
    started = {half: _start(half, settings, workspace) for half in HALVES[: None if together else 1]}
    failed = []
    for half in HALVES:
        process = started.get(half) or _start(half, settings, workspace)
        printed, _ = process.communicate()
        print(printed, end="", flush=True)
        if process.returncode:
            failed.append(half)
    if failed:
        raise OutputError(
            f"{' and '.join(failed)} failed, for the reason given above. Finished outputs are kept: fix the cause and "
            "run the same command again"
        )


def side_by_side(settings: Settings) -> bool:
    """Whether the halves run at the same time: in a cluster, or if no GPUs are requested.

    They do not if a ranking baseline reads tiny models that the recall half trains.
    """
    if needs_tiny_embedder_parts(settings):
        return False
    asked = settings.train.gpus_per_worker, settings.embed.gpus_per_actor, settings.tune.gpus_per_worker
    return bool(os.environ.get("RAY_ADDRESS")) or not any((*asked, settings.generation.gpus_per_engine))


def settings_of_half(settings: Settings) -> dict[str, Any]:
    """The settings for one half. If both run at once on this machine, each gets half of the cores."""
    plain = to_plain(settings)
    if os.environ.get("RAY_ADDRESS") or not side_by_side(settings):
        return plain
    half = max(1, (os.cpu_count() or 1) // 2)
    cpus = (("train", "cpus_per_worker"), ("embed", "cpus_per_actor"), ("tune", "cpus_per_worker"))
    fewer = [f"{section}.{name}={half}" for section, name in cpus if plain[section][name] > half]
    return apply_overrides(plain, fewer)


def _start(half: str, settings: Settings, workspace: Path) -> subprocess.Popen[str]:
    path = workspace / f".{half}.yaml"
    path.write_text(yaml.safe_dump(settings_of_half(settings), allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "notellm2_ray.cli", half, "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_die_with_parent)


def _die_with_parent() -> None:
    """End this process with its parent: otherwise the halves would go on after the command was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
