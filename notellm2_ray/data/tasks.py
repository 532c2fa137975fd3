"""Numbered tasks that exchange their data through Arrow files, run in this process or on Ray Data."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Task = Callable[[Any, int], dict[str, Any]]  # (shared, number) -> strings, numbers and one-dimensional arrays
log = logging.getLogger("notellm2_ray")
_SECONDS_BETWEEN_LINES = 5.0


def write_arrow(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write an Arrow file; it appears complete or not at all, so that Ray may run a task twice."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    os.replace(temporary, path)


def read_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """A memory-mapped Arrow file: a batch costs nothing until its values are read."""
    return pa.ipc.open_file(pa.memory_map(str(path)))


def run_here(task: Task, count: int, shared: Any, label: str) -> Iterator[dict[str, Any]]:
    """The results of ``task`` for 0 .. count - 1, one after another in this process."""
    return (task(shared, number) for number in range(count))


def run_on_ray(task: Task, count: int, shared: Any, label: str) -> Iterator[dict[str, Any]]:
    """The results of ``task`` for 0 .. count - 1, one Ray Data task each, in any order.

    ``shared`` is sent with every task: keep it small.
    """
    if not count:
        return
    import ray

    def call(batch: dict[str, np.ndarray]) -> pa.Table:
        (number,) = batch["id"]
        return pa.table({name: pa.array([value]) for name, value in task(shared, int(number)).items()})

    started = told = time.monotonic()
    answers = ray.data.range(count, override_num_blocks=count).map_batches(call, batch_size=None)
    rows: Iterator[Any] = iter(answers.iter_batches(batch_size=1, batch_format="pyarrow"))
    for done, row in enumerate(rows, start=1):
        now = time.monotonic()
        if now - told > _SECONDS_BETWEEN_LINES:
            told, spent = now, now - started
            log.info("%s: %d of %d in %.0f s, %.0f s left", label, done, count, spent, spent / done * (count - done))
        yield {name: _value(row.column(name)[0]) for name in row.column_names}


def _value(scalar: pa.Scalar) -> Any:
    return scalar.values.to_numpy() if isinstance(scalar, pa.ListScalar) else scalar.as_py()
