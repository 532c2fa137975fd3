"""Writing a rank's state: at once, or from a copy in CPU memory while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map


class StateWriter:
    """Writes states to files.

    Args:
        background: whether :meth:`write` only copies the state and leaves the writing to a thread.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._writing: list[Future[None]] = []

    def write(self, save: Callable[[Any, Any], None], state: Any, path: str | Path) -> None:
        """``save(state, path)``; the state may be changed once this returns."""
        if self._pool is None:
            save(state, path)
        else:
            self._writing.append(self._pool.submit(save, tree_map(_copied, state), path))

    def finish(self) -> None:
        """Wait until all is written; raises what stopped it."""
        writing, self._writing = self._writing, []
        for one in writing:
            one.result()


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)
