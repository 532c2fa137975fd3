"""Random weights that depend on a seed and a name alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from notellm2_ray.core.run import stream_seed


@contextlib.contextmanager
def random_stream(seed: int, name: str) -> Iterator[None]:
    """Torch's CPU generator seeded by the named stream inside, and left untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, name))
        yield
