"""Five times more requests than the service can answer, for half a minute: answers, refusals and recovery.

    python benchmarks/serve_overload.py [--seconds 30] [--times 5]

Capacity is measured by a closed loop (16 connections) on POST /v1/embeddings, where each request costs a forward pass.
It is the mean of 10 s before and 10 s after the overload, because one alone moves by a third on a shared machine. In
between, requests arrive by the clock at five times that rate over 256 connections, whether or not earlier ones were
answered. Printed are answers per second as a share of capacity, latencies of refusals (429 or 503), memory of all
processes before and after, and the time until ten requests in a row are answered again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import tempfile
import time
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import uvloop
from serve_fuzz import memory_mb

CONNECTIONS, POOL = 16, 256
GOAL_SHARE, GOAL_REFUSAL_MS, GOAL_RECOVERY = 0.9, 20.0, 5.0
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Connection(asyncio.Protocol):
    """One keep-alive connection, as cheap as Python allows: the load generator shares the service's cores."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.transport: Any = None

    async def ask(self, number: int) -> int:
        """The status of one request; 0 where the connection broke."""
        loop = asyncio.get_running_loop()
        if self.transport is None:
            try:
                await loop.create_connection(lambda: self, "127.0.0.1", self.port)
            except OSError:
                return 0
        body = b'{"input": "a green house number %d"}' % number
        self.done = loop.create_future()
        self.transport.write(HEAD % len(body) + body)
        return await self.done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.parser = transport, httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        status, stays = self.parser.get_status_code(), self.parser.should_keep_alive()
        if not stays:
            self.transport.close()
            self.transport = None
        self.done.set_result(status)

    def connection_lost(self, error: Exception | None) -> None:
        if self.transport is not None and self.transport.is_closing():
            self.transport = None
            if not self.done.done():
                self.done.set_result(0)


async def capacity(port: int, seconds: float) -> float:
    """Requests per second of a closed loop."""
    until, done = time.perf_counter() + seconds, 0

    async def client() -> None:
        nonlocal done
        connection = Connection(port)
        while time.perf_counter() < until:
            fine = await connection.ask(done) == 200
            done += fine  # on a line of its own: an await between reading and adding would lose other clients' counts

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return done / seconds


async def overload(port: int, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Status (0: the connection broke; -1: no free connection) and seconds of every request."""
    free = [Connection(port) for _ in range(POOL)]
    results: list[tuple[int, float]] = []
    tasks = set()

    async def one(connection: Connection, number: int) -> None:
        began = time.perf_counter()
        status = await connection.ask(number)
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
    from _service import Service, make_world

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        spec = make_world(base / "world").spec("serving")
        service, port = Service(spec, base), spec.serve.port
        try:
            uvloop.run(capacity(port, 3))
            windows = [uvloop.run(capacity(port, 10))]
            before = memory_mb(service.process.pid)
            results = uvloop.run(overload(port, options.times * windows[0], options.seconds))
            again = uvloop.run(recovery(port))
            after = memory_mb(service.process.pid)
            windows.append(uvloop.run(capacity(port, 10)))
        finally:
            service.stop()
    counts = collections.Counter(status for status, _ in results)
    refused = np.array([seconds for status, seconds in results if status in (429, 503)]) * 1000
    full = sum(windows) / 2
    share = counts[200] / options.seconds / full
    late = float(np.quantile(refused, 0.99)) if len(refused) else float("nan")
    rate = len(results) / options.seconds
    print(f"capacity {windows[0]:.0f} requests/s before, {windows[1]:.0f} after; offered {rate:.0f}")
    print("answers: " + ", ".join(f"{status} {count}" for status, count in sorted(counts.items())))
    for text, fine in (
        (f"answered {share:.2f} of capacity (goal {GOAL_SHARE})", share >= GOAL_SHARE),
        (f"refusals p99 {late:.0f} ms (goal {GOAL_REFUSAL_MS:g})", late < GOAL_REFUSAL_MS),
        (f"full service again after {again:.1f} s (goal {GOAL_RECOVERY:g})", again < GOAL_RECOVERY),
    ):
        print(f"{text}: {'reached' if fine else 'MISSED'}")
    print(f"memory of all processes {before:.0f} MB before, {after:.0f} MB after")


if __name__ == "__main__":
    main()
