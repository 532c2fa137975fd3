"""Latency of /v1/recommend on a running service, and how often its time budget leaves no time to rank.

notellm2 serve --preset demo 'serve.ranker={cpus: 0.5}' &
python benchmarks/recommend.py [--url http://127.0.0.1:8000] [--requests 200] [--connections 1]
"""

from __future__ import annotations

import argparse
import collections
import itertools
import threading
import time

import httpx
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[200, 800, 3000], help="milliseconds")
    options = parser.parse_args()
    with httpx.Client(base_url=options.url, timeout=60, trust_env=False) as http:
        users = http.get("/v1/users", params={"limit": 200}).json()["users"]
        version = http.post("/v1/recommend", json={"user_id": users[0], "budget_ms": 10_000}).json()
    print(f"ranked by {version['ranked_by']} when there is time; {options.connections} connection(s)")
    for budget in options.budgets:
        seconds, fallbacks = run(options, users, budget)
        shown = ", ".join(f"{name} {count}" for name, count in fallbacks.items() if name) or "none"
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
        print(f"budget {budget} ms: p50 {p50:.0f} ms, p99 {p99:.0f} ms; fell back in {len(seconds)} requests: {shown}")


def run(options: argparse.Namespace, users: list[str], budget: int) -> tuple[list[float], collections.Counter]:
    """Seconds of each answer, and how often each reason made it fall back to recall's order (None: it was ranked)."""
    seconds: list[float] = []
    fallbacks: collections.Counter = collections.Counter()
    turns = itertools.cycle(users)

    def client() -> None:
        with httpx.Client(base_url=options.url, timeout=60, trust_env=False) as http:
            for _ in range(options.requests // options.connections):
                began = time.perf_counter()
                answer = http.post("/v1/recommend", json={"user_id": next(turns), "budget_ms": budget})
                seconds.append(time.perf_counter() - began)
                fallbacks[answer.json()["fallback"]] += 1

    threads = [threading.Thread(target=client) for _ in range(options.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds, fallbacks


if __name__ == "__main__":
    main()
