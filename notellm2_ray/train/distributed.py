"""Communication between the ranks of a training run. Without a process group every function is the identity.

All collectives of the package are called here. Tensors may lie on any device: each function moves them to where the
process group reads them, and its result is on the device of what was given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def for_group(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` where the process group reads it. NCCL, which Ray Train uses for GPUs, reads only GPU memory."""
    only_gpus = dist.get_backend() == "nccl"
    return tensor.to(torch.device("cuda", torch.cuda.current_device())) if only_gpus else tensor


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all ranks in rank order, with gradients, and the place where this rank's rows begin.

    Args:
        rows: (n, ...) of any type, the same shape on every rank.

    Returns:
        (world_size * n, ...) and the index of this rank's first row. In the backward pass each row gets the sum of the
        gradients from all ranks. Parameter gradients averaged over ranks are then those of the mean of the ranks'
        losses, as if one rank held the whole batch.
    """
    if world_size() == 1:
        return rows, 0
    return _GatherRows.apply(rows), rank() * len(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.num_rows = len(rows)
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        device, gradient = gradient.device, for_group(gradient.contiguous())
        if dist.get_backend() == "nccl":
            own = gradient.new_empty(ctx.num_rows, *gradient.shape[1:])
            dist.reduce_scatter_tensor(own, gradient)
            return own.to(device)
        # Many builds of gloo have no reduce-scatter.
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.num_rows :][: ctx.num_rows].to(device)


def _all_gather(rows: torch.Tensor) -> torch.Tensor:
    if rows.dtype == torch.bool:  # not every backend supports bool
        return _all_gather(rows.to(torch.uint8)).bool()
    own = for_group(rows.detach().contiguous())
    gathered = own.new_empty(world_size() * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(gathered, own)
    return gathered.to(rows.device)


def mean_over_ranks(value: torch.Tensor) -> float:
    """Mean of a scalar over the ranks; NaN on every rank if it is NaN on one."""
    mean = value.detach().double()
    if world_size() > 1:
        mean = for_group(mean.clone())
        dist.all_reduce(mean)
    return float(mean) / world_size()


def gather_objects(value: Any) -> list[Any]:
    """Each rank's picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def overwrite_by_rank_zero(tensor: torch.Tensor) -> None:
    """Give a tensor rank 0's numbers, on every rank; it must lie where the group reads."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
