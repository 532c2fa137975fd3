"""What takes a step: the interface of the two engines, the optimizer they share, and the plain one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train.distributed import barrier, rank, world_size

_STATE_FILE = "state.safetensors"


class StepModule(Protocol):
    """What an engine wraps: a module whose forward pass ends in a loss.

    ``model`` inside it is what is trained and kept; its ``is_fresh(name)`` tells parameters that start random.
    """

    model: Any

    def named_parameters(self) -> Any: ...


class Engine(Protocol):
    """One rank's share of the model, its gradients and its optimizer."""

    module: Any

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass of a step, or of a part of one."""

    def accumulate(self, loss: torch.Tensor) -> None:
        """Backward of a part of a step that others follow; as many on every rank."""

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """Backward of a step (or of its last part), average over ranks, clip, and step.

        The learning rates are ``factor`` times their peaks.
        """

    def save(self, directory: Path) -> None:
        """Write this rank's state into ``directory``; every rank must call it."""

    def load(self, directory: Path) -> None:
        """Take up what :meth:`save` wrote with as many ranks; every rank must call it."""

    def state_dict(self, trained_only: bool = False) -> Mapping[str, torch.Tensor] | None:
        """The model's weights, all or those that are trained, on rank 0, None elsewhere; every rank must call it."""


def make_engine(module: Any, settings: TrainSettings, device: torch.device) -> Engine:
    """The engine that the settings name, around ``module``, whose weights are the same on every rank."""
    if settings.engine == "plain":
        return PlainEngine(module, settings, device)
    from notellm2_ray.train.zero import ZeroEngine

    return ZeroEngine(module, settings, device)


def parameter_groups(module: StepModule, settings: TrainSettings) -> list[dict[str, Any]]:
    """Trainable parameters by peak learning rate and weight decay; ``peak`` in a group is its peak learning rate.

    What has fewer than two dimensions (biases, norms, the temperature) does not decay.
    """
    peaks = (settings.learning_rate, settings.connector_learning_rate or settings.learning_rate)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((module.model.is_fresh(name), parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": peaks[fresh],
            "peak": peaks[fresh],
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (fresh, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW as PyTorch has it, in its fused form: one kernel on a GPU, nothing to compile on a CPU."""
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon, fused=True)


def set_learning_rates(optimizer: Any, factor: float) -> None:
    """Every group's learning rate: its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


class PlainEngine:
    """PyTorch alone: every rank holds everything, DDP averages the gradients."""

    def __init__(self, module: Any, settings: TrainSettings, device: torch.device) -> None:
        self.module = module.to(device)
        self._max_norm = settings.max_grad_norm
        self._optimizer = adamw(parameter_groups(module, settings), settings)
        self._trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        self._forward: nn.Module = module
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self._forward = nn.parallel.DistributedDataParallel(module, ids, gradient_as_bucket_view=True)

    def __call__(self, *inputs: Any) -> Any:
        return self._forward(*inputs)

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
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / _STATE_FILE)
        barrier()

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
