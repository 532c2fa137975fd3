"""Pair mining (NoteLLM-2, Eq. 2) against the same self-join in DuckDB and in Polars, on two cores.

    python benchmarks/mine_pairs.py                     # 1 and 10 million events
    python benchmarks/mine_pairs.py --events 1000000

Every contender reads the same Parquet log, bounds scores by 0.01 and 30, keeps the top 3 per note and writes the pairs,
in a process of its own. First all three are compared at 100,000 events, where they must give the same pairs and scores.
"mining" is the time of that work. "process" adds imports and, for ours above two million events, the start of an
embedded Ray. On a machine with other work, CPU seconds of all processes tell more than either. Memory is the peak of
the whole process tree, Ray's daemons and workers included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from _measure import Measured, machine, run_measured

LOWER, UPPER, TOP, THREADS = 0.01, 30.0, 3, 2
DAYS = 14
EVENTS_PER_USER, NUM_NOTES = 50, 100_000

DUCKDB_QUERY = f"""
COPY (
    WITH views AS (
        SELECT user_id, note_id, min(timestamp) AS first FROM read_parquet('{{log}}')
        WHERE action IN ('view', 'click') GROUP BY user_id, note_id
    ), clicks AS (
        SELECT user_id, note_id, max(timestamp) AS last FROM read_parquet('{{log}}')
        WHERE action = 'click' GROUP BY user_id, note_id
    ), weights AS (
        SELECT user_id, 1::DOUBLE / count(*) AS weight FROM clicks GROUP BY user_id
    ), scores AS (
        SELECT views.note_id AS query_id, clicks.note_id AS target_id, round(sum(weight), 8) AS score
        FROM views JOIN clicks USING (user_id) JOIN weights USING (user_id)
        WHERE first < last AND views.note_id <> clicks.note_id
        GROUP BY query_id, target_id
    )
    SELECT * FROM scores WHERE score BETWEEN {LOWER} AND {UPPER}
    QUALIFY row_number() OVER (PARTITION BY query_id ORDER BY score DESC, target_id) <= {TOP}
) TO '{{out}}' (FORMAT parquet)
"""


def with_duckdb(log: Path, out: Path) -> dict[str, float]:
    import duckdb

    connection = duckdb.connect(config={"threads": THREADS})
    started = time.perf_counter()
    connection.execute(DUCKDB_QUERY.format(log=log, out=out))
    return {"mining": time.perf_counter() - started}


def with_polars(log: Path, out: Path) -> dict[str, float]:
    import polars as pl

    started = time.perf_counter()
    events = pl.scan_parquet(log)
    views = events.filter(pl.col("action").is_in(["view", "click"])).group_by("user_id", "note_id")
    clicks = (
        events.filter(pl.col("action") == "click").group_by("user_id", "note_id").agg(last=pl.col("timestamp").max())
    )
    weights = clicks.group_by("user_id").agg(weight=1 / pl.len())
    (
        views.agg(first=pl.col("timestamp").min())
        .rename({"note_id": "query_id"})
        .join(clicks.rename({"note_id": "target_id"}).join(weights, on="user_id"), on="user_id")
        .filter(pl.col("first") < pl.col("last"), pl.col("query_id") != pl.col("target_id"))
        .group_by("query_id", "target_id")
        .agg(score=pl.col("weight").sum().round(8))
        .filter(pl.col("score").is_between(LOWER, UPPER))
        .sort("query_id", "score", "target_id", descending=[False, True, False])
        .group_by("query_id", maintain_order=True)
        .head(TOP)
        .collect(engine="streaming")
        .write_parquet(out)
    )
    return {"mining": time.perf_counter() - started}


def with_ours(log: Path, out: Path) -> dict[str, float]:
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.core.settings import PairSettings, RaySettings
    from notellm2_ray.data import event_log
    from notellm2_ray.data.pairs import related as pairs

    settings = PairSettings(window_days=None, lower=LOWER, upper=UPPER, top=TOP)
    groups = event_log.list_row_groups([log])
    started = time.perf_counter()
    if sum(group.rows for group in groups) > pairs.PARTITION_EVENTS:
        connect(RaySettings(num_cpus=THREADS, object_store_gb=0.5))
    ray_started = time.perf_counter()
    first, last = event_log.log_span(groups)
    notes = pq.read_table(log.with_name("notes.parquet")).column(0).combine_chunks()
    keys = np.arange(len(notes), dtype=np.uint64)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        mined = pairs.mine_pairs(groups, notes, keys, settings, start=first, end=last + 1, scratch=Path(scratch))
        pq.write_table(mined.pairs, out)
    return {"mining": time.perf_counter() - ray_started, "ray_start": ray_started - started}


CONTENDERS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "notellm2-ray": with_ours,
    "DuckDB": with_duckdb,
    "Polars": with_polars,
}


def write_log(directory: Path, num_events: int) -> Path:
    """Write a log in time order, in which few notes get most events: the first hundred of 100,000 get a tenth."""
    rng = np.random.default_rng(num_events)
    micros = np.sort(rng.integers(0, DAYS * 86_400_000_000, num_events)) + 1_700_000_000_000_000
    users = rng.integers(0, num_events // EVENTS_PER_USER, num_events)
    notes = (NUM_NOTES * rng.random(num_events) ** 3).astype(np.int64)
    table = pa.table(
        {
            "user_id": _ids("user-", users),
            "note_id": _ids("note-", notes),
            "timestamp": pa.array(micros).cast(pa.timestamp("us", "UTC")),
            "action": pa.array(np.where(rng.random(num_events) < 0.25, "click", "view")),
        }
    )
    directory.mkdir()
    pq.write_table(table, directory / "log.parquet", row_group_size=1 << 20)
    pq.write_table(pa.table({"note_id": _ids("note-", np.arange(NUM_NOTES))}), directory / "notes.parquet")
    return directory / "log.parquet"


def _ids(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")


def measure(name: str, log: Path, max_gb: float) -> Measured:
    command = [sys.executable, __file__, "--contender", name, "--log", str(log)]
    env = {"POLARS_MAX_THREADS": str(THREADS), "OMP_NUM_THREADS": str(THREADS)}
    return run_measured(command, env=env, max_bytes=int(max_gb * 2**30))


def result_path(log: Path, name: str) -> Path:
    return log.with_name(f"{name}.parquet")


def check_agreement(log: Path, max_gb: float) -> int:
    """The number of pairs, after checking that every contender finds the same pairs and scores."""
    tables = {}
    for name in CONTENDERS:
        measure(name, log, max_gb)
        tables[name] = _above_the_cut(pq.read_table(result_path(log, name)))
    ours = tables["notellm2-ray"]
    for name, table in tables.items():
        for column in ("query_id", "target_id"):
            if ours.column(column).to_pylist() != table.column(column).to_pylist():
                raise SystemExit(f"{name} finds other pairs than ours")
        if np.abs(ours.column("score").to_numpy() - table.column("score").to_numpy()).max() > 1e-7:
            raise SystemExit(f"{name} finds other scores than ours")
    return ours.num_rows


def _above_the_cut(pairs: pa.Table) -> pa.Table:
    """The pairs in order, without each query's lowest score: which of several targets with it are kept is anybody's."""
    lowest = pairs.group_by("query_id").aggregate([("score", "min")])
    joined = pairs.join(lowest, "query_id")
    kept = joined.filter(pc.greater(joined["score"], pc.add(joined["score_min"], 1e-7)))
    return kept.sort_by([("query_id", "ascending"), ("target_id", "ascending")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--max-gb", type=float, default=14.0, help="a contender that takes more memory is stopped")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        result = CONTENDERS[arguments.contender](arguments.log, result_path(arguments.log, arguments.contender))
        print(json.dumps(result), flush=True)
        return
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        agreed = check_agreement(write_log(Path(directory, "check"), 100_000), arguments.max_gb)
        print(f"100,000 events: the three give the same {agreed:,} pairs and scores\n")
        print_table(Path(directory), arguments.events, arguments.max_gb)


def print_table(directory: Path, sizes: list[int], max_gb: float) -> None:
    """Print time and memory of each contender at each size, ratios to ours, and growth from size to size."""
    head = ("events", "", "mining s", "process s", "CPU s", "peak MiB", "time/ours", "memory/ours", "growth")
    print("{:>12} {:13} {:>9} {:>10} {:>7} {:>9} {:>10} {:>12} {}".format(*head))
    before: dict[str, tuple[int, float]] = {}
    for size in sizes:
        log = write_log(directory / str(size), size)
        base: Measured | None = None
        for name in CONTENDERS:
            done = measure(name, log, max_gb)
            base = base or done
            peak = done.peak_bytes / 2**20
            if done.stopped:
                print(f"{size:12,} {name:13} stopped above {max_gb} GiB after {done.seconds:.1f} s", flush=True)
                continue
            mining = done.answer["mining"]
            times = f"{mining:9.2f} {done.seconds:10.2f} {done.cpu_seconds:7.1f}"
            ratios = f"{mining / base.answer['mining']:10.2f} {done.peak_bytes / base.peak_bytes:12.2f}"
            grown = f"x{mining / before[name][1]:.1f} for x{size / before[name][0]:g}" if name in before else ""
            before[name] = (size, mining)
            print(f"{size:12,} {name:13} {times} {peak:9,.0f} {ratios} {grown}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    main()
