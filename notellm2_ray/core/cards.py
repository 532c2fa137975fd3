"""GPUs that several processes share: one start at a time on each, because a start measures the card's free memory."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# What a process takes of the share of a card that it reserves. The rest is for its CUDA context, which neither PyTorch
# nor vLLM counts.
USED = 0.9


@contextmanager
def only_start(directory: Path | None = None) -> Iterator[None]:
    """Wait until no other process of this machine starts on the cards that this process sees, then hold them.

    vLLM measures how much memory the whole card loses while its model is loaded, and charges itself with all of it. If
    a neighbour loads its own weights meanwhile, the engine's cache becomes too small; if one frees memory, the engine
    stops. The locks are files, so that they hold between clusters, and end with the process that holds them.

    Args:
        directory: of the lock files; None: the system's directory for temporary files.
    """
    with ExitStack() as held:
        for card in visible_cards():  # in order, so that two processes never wait for each other
            file = (directory or Path(tempfile.gettempdir())) / f"notellm2-card-{card}.lock"
            # A file that another user has made may be opened, but not with O_CREAT in a shared directory.
            held.enter_context(_locked(file, os.O_RDONLY | (0 if file.exists() else os.O_CREAT)))
        yield


def visible_cards() -> list[str]:
    """Names of the GPUs that this process sees, as Ray gives them to it, in order; ``all`` if it may see any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return sorted({re.sub(r"[^\w-]", "", one) for one in named.split(",") if one.strip()}) or ["all"]


@contextmanager
def _locked(file: Path, flags: int) -> Iterator[None]:
    descriptor = os.open(file, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
