"""Several ranks as processes of their own, joined by gloo, for the tests of this folder."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, directory: Path, *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on every rank; the tensors (in any nesting) that each returned, in rank order."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_rank, (function, world_size, port, str(directory), arguments), nprocs=world_size)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Any], world_size: int, port: int, directory: str, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what DeepSpeed calls in torch.distributed
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(function(*arguments), f"{directory}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()
