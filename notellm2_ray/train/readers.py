"""Features of notes and questions, made in processes beside a rank, since Python's threads mostly take turns."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

from notellm2_ray.core.settings.train import TrainSettings

Item = TypeVar("Item")
Feature = TypeVar("Feature")

_MOST = 16  # readers of a rank where train.readers is null
_ITEMS_PER_TASK = 16  # few enough to keep all readers busy, enough to be worth a task


class Readers(Generic[Item, Feature]):
    """Makes a feature of each item, in their order. May be called from several threads at once.

    Args:
        make: from an item to its feature. It can be pickled and copied, and need not be safe in several threads.
        processes: how many; 0: the calling thread does it, with a copy of ``make`` for each thread.
    """

    def __init__(self, make: Callable[[Item], Feature], processes: int) -> None:
        self._make, self._own = make, threading.local()
        self._pool = None
        if processes:
            # Forking would copy Ray's and the GPU's threads in the middle of what they do.
            context, arguments = get_context("spawn"), (pickle.dumps(make), os.getpid())
            self._pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=arguments)

    def __call__(self, items: Sequence[Item]) -> list[Feature]:
        """The features.

        Raises:
            Exception: the first that ``make`` raised.
        """
        if self._pool is None:
            if not hasattr(self._own, "make"):
                # Two threads cannot use one fast tokenizer at a time ("Already borrowed").
                self._own.make = copy.deepcopy(self._make)
            return [self._own.make(item) for item in items]
        parts = [items[begin : begin + _ITEMS_PER_TASK] for begin in range(0, len(items), _ITEMS_PER_TASK)]
        tasks = [self._pool.submit(_features, part) for part in parts]
        return [feature for task in tasks for feature in pickle.loads(task.result())]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def num_readers(settings: TrainSettings, device: torch.device) -> int:
    """Processes that read for a rank: ``readers``, or what suits the device and the machine."""
    if settings.readers is not None:
        return settings.readers
    if device.type == "cpu":  # the model needs the cores
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    reserved = int(settings.cpus_per_worker)  # 1, the default, says nothing about what is there
    return max(1, min(_MOST, (reserved if reserved > 1 else cores) - 1))


_state: dict[str, Any] = {}


def _start(made: bytes, parent: int) -> None:
    """Set up a reader, which ends with its rank even if that is killed."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _state["make"] = pickle.loads(made)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _features(items: Sequence[Any]) -> bytes:
    # As bytes: torch would pass each tensor through shared memory, of which containers have little.
    return pickle.dumps([_state["make"](item) for item in items], protocol=5)
