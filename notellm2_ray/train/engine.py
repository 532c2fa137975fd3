"""The interface of training engines, and the optimizer that they share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from notellm2_ray.core.settings.train import TrainSettings


class StepModule(Protocol):
    """What an engine wraps: a module whose forward pass ends in a loss.

    Its ``model`` is trained and saved; ``model.is_fresh(name)`` says whether a parameter starts from random values.
    """

    model: Any

    def named_parameters(self) -> Any: ...


class Engine(Protocol):
    """One rank's share of the model, its gradients and its optimizer."""

    module: Any

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass of a step, or of a part of a step."""

    def accumulate(self, loss: torch.Tensor) -> None:
        """Backward pass of a part of a step, except the last one; every rank must have as many parts."""

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """Backward pass of a step (or of its last part), then average over ranks, clip, and update the weights.

        The learning rates are ``factor`` times their peaks.
        """

    def save(self, directory: Path) -> None:
        """Write this rank's state into ``directory``; every rank must call it."""

    def load(self, directory: Path) -> None:
        """Restore the state that :meth:`save` wrote with the same number of ranks; every rank must call it."""

    def state_dict(self, trained_only: bool = False) -> Mapping[str, torch.Tensor] | None:
        """The model's weights, all or only trained ones, on rank 0 and None elsewhere; every rank must call it."""


def parameter_groups(module: StepModule, settings: TrainSettings) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal peak learning rate (``peak``) and weight decay.

    Parameters of fewer than two dimensions (biases, norms, the temperature) have no weight decay.
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
    """PyTorch's AdamW in its fused form: one kernel on a GPU, nothing to compile on a CPU."""
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon, fused=True)


def set_learning_rates(optimizer: Any, factor: float) -> None:
    """Set every group's learning rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
