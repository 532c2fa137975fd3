"""Ranks that share one load: rank 0 builds the model, and the others get its weights as their engine needs them.

If every rank built seven billion float32 parameters on its CPU, a node of eight would need 234 GB. Here rank 0 holds
29 GB, and the others a model whose parameters have shapes and no memory, until each parameter is broadcast to their
devices: whole, or under ZeRO-3 one after another, each divided among the ranks before the next.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from notellm2_ray.train.distributed import from_rank_zero, overwrite_by_rank_zero, rank, world_size

Built = TypeVar("Built")


def build_once(make: Callable[[], Built]) -> Built:
    """What ``make`` makes on rank 0, on every rank; on the others its parameters are hollow.

    A hollow parameter has shape, type and ``requires_grad``, and may be counted, grouped and frozen.
    """
    if world_size() == 1:
        return make()
    built = make() if rank() == 0 else None
    data = from_rank_zero(None if built is None else _hollowed(built))
    return pickle.loads(data) if built is None else built


def fill(module: nn.Module, device: torch.device) -> None:
    """Move a module that :func:`build_once` gave to ``device``, with rank 0's weights on every rank."""
    for parameter in module.parameters():
        data = _on_device(parameter, device)
        overwrite_by_rank_zero(data)
        parameter.data = data


def share_out(module: nn.Module, device: torch.device, config: dict[str, Any]) -> None:
    """Divide such a module's weights among the ranks, as ZeRO-3 does: each parameter is whole on a device only briefly.

    Args:
        config: of DeepSpeed.
    """
    from deepspeed import zero

    where = "cpu" if "offload_param" in config["zero_optimization"] else None
    # Parts before the whole. DeepSpeed passes each parameter from rank 0 to the others, and leaves divided ones alone.
    for part in reversed(list(module.modules())):
        own = [one for one in part.parameters(recurse=False) if not hasattr(one, "ds_id")]
        for parameter in own:
            parameter.data = _on_device(parameter, device)
        if own:
            pinned = where is not None and config["zero_optimization"]["offload_param"]["pin_memory"]
            zero.Init(module=part, config_dict_or_path=config, remote_device=where, pin_memory=pinned)


def _on_device(parameter: nn.Parameter, device: torch.device) -> torch.Tensor:
    """A parameter's numbers on the device, or on ranks that have none, room for them."""
    data = parameter.data
    return data.to(device).contiguous() if rank() == 0 else torch.empty(data.shape, dtype=data.dtype, device=device)


def _hollowed(built: Any) -> bytes:
    """Everything but the numbers in parameters, pickled. A parameter that has two names stays one."""
    from ray.cloudpickle import CloudPickler

    class Hollow(CloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, nn.Parameter):
                return _parameter, (tuple(obj.shape), obj.dtype, obj.requires_grad)
            return super().reducer_override(obj)

    file = io.BytesIO()
    Hollow(file).dump(built)
    return file.getvalue()


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, trained: bool) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), trained)
