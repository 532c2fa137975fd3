"""Five times more requests than the service can answer, for half a minute: what is answered, refused, and afterwards.

    python benchmarks/serve_overload.py [--seconds 30] [--times 5]

Capacity is measured first by a closed loop (16 connections) on POST /v1/embeddings, where each request costs a forward
pass. Then requests arrive on a clock, at five times that rate, whether or not the ones before are answered,
over 256 connections. Printed: answers per second as a share of capacity, latencies of refusals (429 or 503), memory of
all processes before and after, and the time until ten requests in a row are answered again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from serve_fuzz import ROOT, memory_mb

CONNECTIONS, POOL = 16, 256
GOAL_SHARE, GOAL_REFUSAL_MS, GOAL_RECOVERY = 0.9, 20.0, 5.0
HEAD = "POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


class Connection:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self.port, self.writer = port, None

    async def ask(self, number: int) -> int:
        """The status of one request."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps({"input": f"a green house number {number}"}).encode()
        self.writer.write(f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = next((line for line in head.split(b"\r\n") if line.startswith(b"content-length:")), b":0")
            await self.reader.readexactly(int(length.split(b":")[1]))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.writer = None
            return 0
        if b"connection: close" in head:
            self.writer.close()
            self.writer = None
        return int(head[9:12])


async def capacity(port: int, seconds: float) -> float:
    """Requests per second of a closed loop."""
    until, done = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal done
        connection = Connection(port)
        while time.perf_counter() < until:
            fine = await connection.ask(done) == 200
            done += fine  # not in one line: an await between reading and adding would lose what others add

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return done / seconds


async def overload(port: int, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Status (0: the connection broke; -1: no free connection) and seconds of every request."""
    free = [Connection(port) for _ in range(POOL)]
    results: list[tuple[int, float]] = []
    tasks = set()

    async def one(connection: Connection, number: int) -> None:
        began = time.perf_counter()
        try:
            status = await connection.ask(number)
        except OSError:
            status = 0
        results.append((status, time.perf_counter() - began))
        free.append(connection)

    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        wait = began + number / rate - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        elif number % 16 == 0:
            await asyncio.sleep(0)
        if not free:
            results.append((-1, 0.0))
            continue
        task = asyncio.create_task(one(free.pop(), number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return results


async def recovery(port: int) -> float:
    """Seconds until ten requests in a row are answered."""
    began, right, connection = time.perf_counter(), 0, Connection(port)
    while right < 10:
        right = right + 1 if await connection.ask(right) == 200 else 0
        assert time.perf_counter() - began < 60, "no full service after a minute"
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--times", type=float, default=5)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "serve")]
    from serving import Service, make_world

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        plan = make_world(base / "world").plan("serving")
        service, port = Service(plan, base), plan.serve.port
        try:
            asyncio.run(capacity(port, 3))
            full = asyncio.run(capacity(port, 10))
            before = memory_mb(service.process.pid)
            results = asyncio.run(overload(port, options.times * full, options.seconds))
            again = asyncio.run(recovery(port))
            after = memory_mb(service.process.pid)
        finally:
            service.stop()
    counts = collections.Counter(status for status, _ in results)
    refused = np.array([seconds for status, seconds in results if status in (429, 503)]) * 1000
    share = counts[200] / options.seconds / full
    late = float(np.quantile(refused, 0.99)) if len(refused) else float("nan")
    print(f"capacity {full:.0f} requests/s; {len(results) / options.seconds:.0f} requests/s for {options.seconds:g} s: "
          + ", ".join(f"{status} {count}" for status, count in sorted(counts.items())))  # fmt: skip
    for text, fine in (
        (f"answered {share:.2f} of capacity (goal {GOAL_SHARE})", share >= GOAL_SHARE),
        (f"refusals p99 {late:.0f} ms (goal {GOAL_REFUSAL_MS:g})", late < GOAL_REFUSAL_MS),
        (f"full service again after {again:.1f} s (goal {GOAL_RECOVERY:g})", again < GOAL_RECOVERY),
    ):
        print(f"{text}: {'reached' if fine else 'MISSED'}")
    print(f"memory of all processes {before:.0f} MB before, {after:.0f} MB after")


if __name__ == "__main__":
    main()
