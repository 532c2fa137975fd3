"""Processes below another one, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def processes() -> Iterator[tuple[int, int]]:
    """(pid, parent's pid) of all running processes."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(path.parent.name), int(parent)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    children: dict[int, list[int]] = {}
    for child, parent in processes():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found[1:]


def named(pid: int, name: str) -> list[psutil.Process]:
    """The processes below ``pid`` with ``name`` in their command line, as Ray puts an actor's class there."""
    family = psutil.Process(pid).children(recursive=True)
    return [one for one in family if one.is_running() and name in command(one.pid)]


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Run ``act`` in a thread as soon as a condition holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def end_family(family: list[int]) -> None:
    """Wait for Ray's processes, which end with their driver; after some seconds kill ours that are left, by pid."""
    end = time.monotonic() + 5
    while time.monotonic() < end and (left := {pid for pid, _ in processes()} & set(family)):
        time.sleep(0.1)
    left = {pid for pid, _ in processes()} & set(family)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
