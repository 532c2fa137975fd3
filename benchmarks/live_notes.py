"""Durable upserts a second while the index is searched, and what that does to the searches.

    python benchmarks/live_notes.py
    python benchmarks/live_notes.py --notes 20000 --seconds 5

One process holds the writer, a follower with its index, and a searching thread. Searches are by id, for the top 100,
and are timed first without and then with the writer at work. Both are from one run, so they share the machine's noise.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _measure import machine

DIM, GROUP, CLUSTERS = 64, 64, 2000


def vectors(rows: int, seed: int) -> np.ndarray:
    """(rows, 64) clustered unit vectors."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLUSTERS, DIM)).astype(np.float32)
    made = centres[rng.integers(CLUSTERS, size=rows)] + 0.6 * rng.normal(size=(rows, DIM)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def make_table(path: Path, count: int, image_bytes: int) -> None:
    """A live table of notes n0, n1, ..."""
    from notellm2_ray.live.creation import create_table
    from notellm2_ray.live.rows import live_schema

    schema = live_schema(DIM, model_fingerprint="bench")
    matrix, images = vectors(count, 1), np.random.default_rng(2)

    def batches():
        for start in range(0, count, 1000):
            rows = range(start, min(start + 1000, count))
            flat = pa.array(matrix[rows.start : rows.stop].ravel())
            yield pa.RecordBatch.from_pydict(
                {
                    "note_id": [f"n{row}" for row in rows],
                    "title": [f"title {row}" for row in rows],
                    "topics": [[f"topic {row % 50}"] for row in rows],
                    "content": [""] * len(rows),
                    "image": pa.array([images.bytes(image_bytes) for _ in rows], pa.binary()),
                    "created_at": pa.nulls(len(rows), schema.field("created_at").type),
                    "embedding": pa.FixedSizeListArray.from_arrays(flat, DIM),
                }
            )

    create_table(path, batches(), schema)


def searches(index, count: int, seconds: float) -> np.ndarray:
    """Milliseconds of searches by id, one after another."""
    rng, times = np.random.default_rng(3), []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        note = f"n{rng.integers(count)}"
        started = time.perf_counter()
        index.search(note, 100)
        times.append(time.perf_counter() - started)
        time.sleep(0.0005)  # lets other threads of this process run
    return np.array(times) * 1000


def write(
    store, count: int, image_bytes: int, stop: threading.Event, done: list[tuple[float, float, int]], number: int
) -> None:
    """Upsert batches of 64 notes until told to stop; appends (seconds taken, time, seq) of each batch to ``done``.

    A tenth of the notes are new. ``number`` is the thread's: each draws notes of its own.
    """
    from notellm2_ray.live.rows import LiveNote

    rng = np.random.default_rng([4, number])
    fresh = vectors(GROUP * 64, 5)
    while not stop.is_set():
        ids = [f"n{n}" for n in rng.choice(int(count * 1.1), GROUP, replace=False)]
        picked = fresh[rng.integers(len(fresh), size=GROUP)]
        notes = [
            LiveNote(i, v, title="t", topics=["a"], image=bytes(image_bytes)) for i, v in zip(ids, picked, strict=True)
        ]
        started = time.perf_counter()
        seq = store.upsert(notes)
        done.append((time.perf_counter() - started, time.time(), seq))


def show(name: str, times: np.ndarray) -> None:
    p50, p99 = np.percentile(times, [50, 99])
    print(
        f"{name:34s} n {len(times):6d}   p50 {p50:8.3f} ms   p99 {p99:8.3f} ms   max {times.max():8.1f} ms", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=200_000)
    parser.add_argument("--image-bytes", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--writers", type=int, default=1, help="threads that each wait for their own batch")
    arguments = parser.parse_args()
    import faiss

    from notellm2_ray.core.settings.retrieval import IndexSettings
    from notellm2_ray.live.follower import StoreFollower
    from notellm2_ray.live.store import LiveStore

    faiss.omp_set_num_threads(1)
    print(f"{machine()}; {arguments.notes} notes, one FAISS thread")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "live.lance"
        make_table(path, arguments.notes, arguments.image_bytes)
        started = time.perf_counter()
        follower = StoreFollower(path, IndexSettings(kind="ivf")).start()
        print(f"load and build: {time.perf_counter() - started:.1f} s; {follower.index.info()['main']}")
        show("search, idle", searches(follower.index, arguments.notes, arguments.seconds / 2))
        with LiveStore.open(path) as store:
            stop = threading.Event()
            done: list[Any] = []
            threads = [
                threading.Thread(target=write, args=(store, arguments.notes, arguments.image_bytes, stop, done, number))
                for number in range(arguments.writers)
            ]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            show("search, while notes are written", searches(follower.index, arguments.notes, arguments.seconds))
            stop.set()
            for thread in threads:
                thread.join()
            took = time.perf_counter() - began
            show("durable upsert of 64 notes", np.array([row[0] for row in done]) * 1000)
            print(f"durable upserts: {len(done) * GROUP / took:.0f} notes/s in batches of {GROUP}; {store.info()}")
            assert follower.wait_for(store.seq)
            print(f"follower: {follower.freshness()}\nindex: {follower.index.info()}")
            ids = [f"n{n}" for n in np.random.default_rng(8).choice(arguments.notes, 50, replace=False)]
            times = []
            for _ in range(30):
                started = time.perf_counter()
                follower.notes(ids)
                times.append((time.perf_counter() - started) * 1000)
            show("50 notes by id, images too", np.array(times))
        show("search, afterwards", searches(follower.index, arguments.notes, arguments.seconds / 2))
        follower.close()


if __name__ == "__main__":
    main()
