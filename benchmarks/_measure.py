"""Runs a contender in a process of its own, and samples the memory of everything that it starts."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

_SECONDS_BETWEEN_SAMPLES = 0.1


class Measured(NamedTuple):
    """Result and cost of a contender's process."""

    answer: dict[str, Any]  # the JSON object in its last line of output; empty if it was stopped
    seconds: float  # from its start to its end
    cpu_seconds: float  # user and system time of the process and its descendants, as last sampled
    peak_bytes: int  # most memory held at once by the process and its descendants
    stopped: bool  # it was stopped because it passed the limit of memory


def run_measured(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, max_bytes: int | None = None
) -> Measured:
    """Run a command that prints one JSON object as its last line, sampling the memory of its process tree.

    Memory is the sum of proportional set sizes. There a page that several processes share (Ray's object store, mapped
    files, libraries) counts once; in plain resident sizes it would count once for each process.

    Raises:
        RuntimeError: the command failed; its output is in the message.
    """
    with tempfile.TemporaryFile("w+") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        peak, cpu_seconds, stopped = _watch(process, max_bytes)
        seconds = time.perf_counter() - started
        file.seek(0)
        output = file.read()
    if stopped:
        return Measured({}, seconds, cpu_seconds, peak, True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit status {process.returncode}:\n{output}")
    return Measured(json.loads(output.strip().splitlines()[-1]), seconds, cpu_seconds, peak, False)


def _watch(process: subprocess.Popen, max_bytes: int | None) -> tuple[int, float, bool]:
    root = psutil.Process(process.pid)
    cpu_seconds: dict[int, float] = {}
    peak, stopped = 0, False
    while True:
        try:
            process.wait(timeout=_SECONDS_BETWEEN_SAMPLES)
            return peak, sum(cpu_seconds.values()), stopped
        except subprocess.TimeoutExpired:
            held = _sample(root, cpu_seconds)
            peak = max(peak, held)
        if max_bytes is not None and held > max_bytes and not stopped:
            stopped = True
            _kill(root)


def _sample(root: psutil.Process, cpu_seconds: dict[int, float]) -> int:
    """Bytes that the process tree holds; writes the CPU time of each process into ``cpu_seconds``."""
    held = 0
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            times = process.cpu_times()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
            continue
        cpu_seconds[process.pid] = times.user + times.system
        held += next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return held


def machine() -> str:
    """One line about the machine that a benchmark ran on."""
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{os.cpu_count()} x {name}, {memory:.0f} GiB, load {load:.1f} at the start, Python {sys.version.split()[0]}"


def _kill(root: psutil.Process) -> None:
    for process in [*root.children(recursive=True), root]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
