"""Random weights that depend only on a seed and a name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from notellm2_ray.core.run import stream_seed


@contextlib.contextmanager
def random_stream(seed: int, name: str) -> Iterator[None]:
    """Seed torch's CPU generator from ``seed`` and ``name`` inside the context; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, name))
        yield
