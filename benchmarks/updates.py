"""Single updates of the same notes, over and over: what they do to the table's size, its versions and the searches.

    python benchmarks/updates.py
    python benchmarks/updates.py --updates 2000 --image-bytes 20000

One process writes single notes at a steady rate, as the service's writer gets them. This one follows the table,
searches its index all the time, and looks at the table's directory once a second.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from _measure import machine
from live_notes import make_table, show, vectors


def directory_bytes(path: Path) -> int:
    """Bytes of all files below a directory."""
    found = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a clean-up has removed it
            found += file.stat().st_size
    return found


def write(path: Path, count: int, image_bytes: int, updates: int, rate: float) -> None:
    """Upsert one of ``count`` notes after another, ``rate`` a second."""
    from notellm2_ray.live.rows import LiveNote
    from notellm2_ray.live.store import LiveStore

    rng, fresh = np.random.default_rng(4), vectors(1024, 5)
    with LiveStore.open(path) as store:
        began, waits = time.monotonic(), []
        for number in range(updates):
            due = began + number / rate
            time.sleep(max(0.0, due - time.monotonic()))
            note = LiveNote(f"n{rng.integers(count)}", fresh[number % 1024], title="t", image=rng.bytes(image_bytes))
            store.upsert([note])
            waits.append(time.monotonic() - due)
        show("update, from its due time", np.array(waits) * 1000)
        print(f"{updates / (time.monotonic() - began):.1f} updates/s; {store.info()}", flush=True)


def watch(path: Path, follower, count: int, done) -> tuple[np.ndarray, int, int]:
    """Milliseconds of searches by id until ``done()``; the most bytes and versions that the table had meanwhile."""
    rng, times, most_bytes, most_versions, look = np.random.default_rng(3), [], 0, 0, 0.0
    while not done():
        started = time.perf_counter()
        follower.index.search(f"n{rng.integers(count)}", 100)
        times.append(time.perf_counter() - started)
        if started > look:
            look = started + 1
            most_bytes = max(most_bytes, directory_bytes(path))
            most_versions = max(most_versions, len(list((path / "_versions").glob("*.manifest"))))
        time.sleep(0.005)
    return np.array(times) * 1000, most_bytes, most_versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--image-bytes", type=int, default=3000)
    parser.add_argument("--quiet-seconds", type=float, default=20, help="of searches before the updates")
    given = parser.parse_args()
    import faiss

    from notellm2_ray.core.settings.retrieval import IndexSettings
    from notellm2_ray.live.follower import StoreFollower
    from notellm2_ray.live.store import LiveStore

    faiss.omp_set_num_threads(1)
    print(f"{machine()}; {given.notes} notes, {given.updates} updates at {given.rate:g}/s", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "live.lance"
        make_table(path, given.notes, given.image_bytes)
        LiveStore.open(path).close()  # makes the index of note ids
        fresh = directory_bytes(path)
        follower = StoreFollower(path, IndexSettings()).start()
        until = time.monotonic() + given.quiet_seconds
        before, _, _ = watch(path, follower, given.notes, lambda: time.monotonic() > until)
        show("search, before", before)
        arguments = path, given.notes, given.image_bytes, given.updates, given.rate
        writer = multiprocessing.get_context("spawn").Process(target=write, args=arguments)
        writer.start()
        during, most_bytes, most_versions = watch(path, follower, given.notes, lambda: not writer.is_alive())
        show("search, during the updates", during)
        slower = np.percentile(during, 99) / np.percentile(before, 99)
        print(f"bytes: {fresh:,} fresh, at most {most_bytes:,}: {most_bytes / fresh:.2f} times")
        print(f"at most {most_versions} versions; searches' p99 {slower:.2f} times; follower: {follower.freshness()}")
        follower.close()
    if writer.exitcode:
        raise SystemExit("the writer failed")


if __name__ == "__main__":
    main()
