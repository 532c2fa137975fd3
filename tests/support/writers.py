"""Processes that write without a pause until they are killed, and say in a log what was acknowledged."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

from notellm2_ray.live.store import LiveStore
from notellm2_ray.live.upkeep import Upkeep
from notellm2_ray.users.rows import UserEvent
from notellm2_ray.users.store import UserStore
from tests.support.live_notes import note

THREADS = 4


def start_writer(writer: Callable[[Path, Path, int], None], path: Path, log: Path, first: int) -> BaseProcess:
    """Run one of the writers below in a process of its own, and wait until it has had something acknowledged.

    The processes are forked from one that has imported their libraries but opened nothing: each starts in a fraction of
    a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lance", "pyarrow.dataset", "pyarrow.parquet", __name__])
    before = log.stat().st_size if log.exists() else 0
    process = context.Process(target=writer, args=(path, log, first))
    process.start()
    deadline = time.monotonic() + 60
    while not log.exists() or log.stat().st_size == before:
        assert process.is_alive(), "the writer ended by itself"
        assert time.monotonic() < deadline, "nothing was acknowledged"
        time.sleep(0.002)
    return process


def write_notes(path: Path, log: Path, first: int) -> None:
    """Upsert and delete the same few notes; a line for each: id, value, seq, and "there" or "gone"."""
    acknowledged = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = LiveStore.open(path, upkeep=Upkeep(fragment_rows=200, small_files=5, keep_versions=timedelta(0)))

    def write(thread: int) -> None:
        value = first
        while True:
            value += 1
            note_id = f"t{thread}-{value % 7}"
            gone = value % 11 == 0
            seq = store.delete([note_id]) if gone else store.upsert([note(note_id, value)])
            os.write(acknowledged, f"{note_id} {value} {seq} {'gone' if gone else 'there'}\n".encode())

    _run(write)


def write_events(path: Path, log: Path, first: int) -> None:
    """Log each event twice and put full blocks into words.

    Lines: "event", user and number; "block", user and block; "wrong" where the store answered wrongly.
    """
    acknowledged = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = UserStore(path)

    def write(thread: int) -> None:
        number, user = first, f"u{thread}"
        while True:
            number += 1
            when = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
            events = [UserEvent(user, f"n{number}", when, "click", event_id=f"{user}-{number}")] * 2
            if store.add_events(events) != ["added", "duplicate"]:
                os.write(acknowledged, b"wrong\n")
            os.write(acknowledged, f"event {user} {number}\n".encode())
            pending = next((block for block in store.pending() if block.user_id == user), None)
            if pending is not None:
                text = " ".join(pending.note_ids)
                if store.save_preference(user, pending.block, pending.fingerprint, text) != "saved":
                    os.write(acknowledged, b"wrong\n")
                os.write(acknowledged, f"block {user} {pending.block}\n".encode())

    _run(write)


def _run(write: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=write, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
