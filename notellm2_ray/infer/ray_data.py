"""How the stages of this package use Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_MAX_BLOCKS = 20_000  # Ray keeps one object for each block of a dataset


@contextmanager
def own_context() -> Iterator[Any]:
    """Ray Data's settings for the datasets made inside; the caller's settings stay as they are."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    # Ray would reserve a share of the machine's memory for each actor, on top of what the actor asks for, and could
    # never grant it.
    context.default_map_logical_memory_enabled = False
    with DataContext.current(context):
        yield context


def dataset_of(rows: Sequence[Any]) -> Any:
    """A dataset of NamedTuples, one row each, in as many blocks as there are rows (up to a limit)."""
    import ray

    return ray.data.from_items([row._asdict() for row in rows], override_num_blocks=min(len(rows), _MAX_BLOCKS))
