"""Rank 0 of two ranks with a GPU each, on a machine that has neither: what NCCL refuses is refused here too.

The GPU is a label. Every tensor that the code puts on it is a :class:`OnGpu`, which says that its device is ``cuda:0``
and holds its numbers in ordinary memory. The process group has one other rank, which always passes what this one does.
Weights keep the label of ordinary memory, since PyTorch moves them in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)


class OnGpu(torch.Tensor):
    """A tensor that was put on the GPU, or was computed from one."""


class _Gpu(TorchFunctionMode):
    """Labels what is put on the GPU, and takes the label from what is fetched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._nn._parse_to:  # nn.Module.to, which then moves one weight after the other
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__ and isinstance(args[0], OnGpu):
            return GPU
        given = [*args, *kwargs.values()]
        devices = [one for one in given if isinstance(one, torch.device)]
        out = func(*map(_memory, args), **{name: _memory(one) for name, one in kwargs.items()})
        fetched = func is torch.Tensor.cpu or torch.device("cpu") in devices or "cpu" in args[1:]
        computed = not fetched and any(isinstance(one, OnGpu) for one in given)
        place = OnGpu if GPU in devices or computed else torch.Tensor
        moves = isinstance(out, torch.Tensor) and isinstance(out, OnGpu) != (place is OnGpu)
        return out.as_subclass(place) if moves else out

    def backward(self, run: Any) -> Any:
        """``run``, which starts a backward pass, with this mode in that pass too (PyTorch switches it off there)."""

        def with_mode(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        return with_mode


def _memory(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) and argument == GPU else argument


class _Twin:
    """The collectives of NCCL between this rank and one that passes the same."""

    calls: list[str]

    def __init__(self) -> None:
        self.calls = []

    def _check(self, name: str, *tensors: torch.Tensor) -> None:
        self.calls.append(name)
        for tensor in tensors:
            if tensor.device != GPU:
                raise RuntimeError(f"{name}: No backend type associated with device type {tensor.device.type}")

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._check("all_reduce", tensor)
        tensor.mul_(2)

    def all_gather_into_tensor(self, out: torch.Tensor, own: torch.Tensor) -> None:
        self._check("all_gather_into_tensor", out, own)
        out.copy_(torch.cat([own, own]))

    def reduce_scatter_tensor(self, own: torch.Tensor, whole: torch.Tensor) -> None:
        self._check("reduce_scatter_tensor", own, whole)
        own.copy_(2 * whole[: len(own)])

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self._check("broadcast", tensor)

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        values[:] = [value, value]

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        pass

    def barrier(self) -> None:
        pass


@contextmanager
def first_of_two_gpus() -> Iterator[list[str]]:
    """Within it, this process is rank 0 of two; yields the names of the collectives that tensors were passed to."""
    twin = _Twin()
    answers = {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "get_backend": "nccl"}
    changes = {name: lambda value=value: value for name, value in answers.items()}
    names = [name for name in vars(_Twin) if not name.startswith("_") and name != "calls"]
    changes |= {name: getattr(twin, name) for name in names}

    def replicated(module: Any, device_ids: list[int], **_: Any) -> Any:
        assert device_ids == [GPU.index]
        return module

    gpu = _Gpu()
    with (
        patch.multiple(dist, **changes),
        patch.object(torch.cuda, "current_device", lambda: GPU.index),
        patch.object(torch.nn.parallel, "DistributedDataParallel", replicated),
        patch.object(torch.autograd, "_engine_run_backward", gpu.backward(torch.autograd._engine_run_backward)),
        gpu,
    ):
        yield twin.calls
