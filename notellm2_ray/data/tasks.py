"""Numbered tasks that exchange their data through Arrow files, run in this process or on Ray Data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from notellm2_ray.core.progress import Progress

Task = Callable[[Any, int], dict[str, Any]]  # (shared, number) -> strings, numbers and one-dimensional arrays


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


def run_here(task: Task, count: int, shared: Any, label: str, unit: str) -> Iterator[dict[str, Any]]:
    """The results of ``task`` for 0 .. count - 1, one after another in this process."""
    return (task(shared, number) for number in range(count))


def run_on_ray(task: Task, count: int, shared: Any, label: str, unit: str) -> Iterator[dict[str, Any]]:
    """The results of ``task`` for 0 .. count - 1, one Ray Data task each, in any order.

    Args:
        shared: sent with every task: keep it small.
        label: of the log lines.
        unit: what a task does, in the log lines, as in "units of events read".
    """
    if not count:
        return
    import ray

    def call(batch: dict[str, np.ndarray]) -> pa.Table:
        (number,) = batch["id"]
        return pa.table({name: pa.array([value]) for name, value in task(shared, int(number)).items()})

    progress = Progress(label, unit, count)
    results = ray.data.range(count, override_num_blocks=count).map_batches(call, batch_size=None)
    rows: Iterator[Any] = iter(results.iter_batches(batch_size=1, batch_format="pyarrow"))
    for row in rows:
        progress.add()
        yield {name: _value(row.column(name)[0]) for name in row.column_names}


def _value(scalar: pa.Scalar) -> Any:
    return scalar.values.to_numpy() if isinstance(scalar, pa.ListScalar) else scalar.as_py()
