"""The plain engine: PyTorch alone, with DDP over several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train.distributed import barrier, rank, world_size
from notellm2_ray.train.engine import adamw, parameter_groups, set_learning_rates
from notellm2_ray.train.one_load import fill
from notellm2_ray.train.state_writer import StateWriter

_STATE_FILE = "state.safetensors"


class PlainEngine:
    """PyTorch alone: every rank holds the whole model, and DDP averages the gradients."""

    def __init__(self, module: Any, settings: TrainSettings, device: torch.device, loaded_once: bool = False) -> None:
        if loaded_once:
            fill(module, device)
        self.module = module.to(device)
        self._max_norm = settings.max_grad_norm
        self._writer = StateWriter(settings.background_checkpoints)
        self._optimizer = adamw(parameter_groups(module, settings), settings)
        self._trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        self._forward: nn.Module = module
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self._forward = nn.parallel.DistributedDataParallel(module, ids, gradient_as_bucket_view=True)

    def __call__(self, *inputs: Any, last: bool = True) -> Any:
        # DDP averages gradients only in the backward pass of its own forward pass, and then all that have accumulated.
        return (self._forward if last else self.module)(*inputs)

    def accumulate(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, loss: torch.Tensor, factor: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), self._max_norm)
        set_learning_rates(self._optimizer, factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def save(self, directory: Path) -> None:
        from safetensors.torch import save_file

        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            tensors = {f"weight/{name}": parameter.detach() for name, parameter in self._trained.items()}
            for name, parameter in self._trained.items():
                for key, value in self._optimizer.state[parameter].items():
                    tensors[f"{key}/{name}"] = value
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            self._writer.write(save_file, tensors, directory / _STATE_FILE)
        barrier()

    def finish_save(self) -> None:
        self._writer.finish()

    def load(self, directory: Path) -> None:
        from safetensors.torch import load_file

        state = load_file(directory / _STATE_FILE)
        if {name.partition("/")[2] for name in state} != set(self._trained):
            raise OutputError(
                f"{directory} is a checkpoint of another model: delete the output directory and train again"
            )
        for name, parameter in self._trained.items():
            with torch.no_grad():
                parameter.copy_(state.pop(f"weight/{name}"))
            mine = self._optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                mine[key] = state.pop(f"{key}/{name}").to(parameter.device)

    def state_dict(self, trained_only: bool = False) -> Mapping[str, torch.Tensor] | None:
        if rank() != 0:
            return None
        return {n: p.detach() for n, p in self._trained.items()} if trained_only else self.module.model.state_dict()
