"""The interface of training engines, and the optimizer that they share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.models.lora import is_lora

# The best rate of LoRA is about ten times that of full fine-tuning, whatever the rank ("LoRA Without Regret", 2025).
_LORA_FACTOR = 10


class StepModule(Protocol):
    """What an engine wraps: a module whose forward pass ends in a loss.

    Its ``model`` is trained and saved; ``model.is_fresh(name)`` says whether a parameter starts from random values.
    """

    model: Any

    def named_parameters(self) -> Any: ...


class Engine(Protocol):
    """One rank's share of the model, its gradients and its optimizer."""

    module: Any

    def __call__(self, *inputs: Any, last: bool = True) -> Any:
        """The forward pass of a step, or of a part of a step.

        Args:
            last: whether :meth:`update` follows. Before :meth:`accumulate` it may be False, which saves communication.
        """

    def accumulate(self, loss: torch.Tensor) -> None:
        """Backward pass of a part of a step, except the last one; every rank must have as many parts."""

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """Backward pass of a step (or of its last part), then average over ranks, clip, and update the weights.

        The learning rates are ``factor`` times their peaks.
        """

    def save(self, directory: Path) -> None:
        """Write this rank's state into ``directory``, or begin to; every rank must call it, and then another method."""

    def finish_save(self) -> None:
        """Wait until this rank's state is written."""

    def load(self, directory: Path) -> None:
        """Restore the state that :meth:`save` wrote with the same number of ranks; every rank must call it."""

    def state_dict(self, trained_only: bool = False) -> Mapping[str, torch.Tensor] | None:
        """The model's weights, all or only trained ones, on rank 0 and None elsewhere; every rank must call it."""


def parameter_groups(module: StepModule, settings: TrainSettings) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal peak learning rate (``peak``) and weight decay.

    Parameters of fewer than two dimensions (biases, norms, the temperature) have no weight decay.
    """
    rate = settings.learning_rate
    assert rate is not None, "train/rates.py fills it in"
    lora = rate if settings.lora is None else settings.lora.learning_rate or _LORA_FACTOR * rate
    peaks = (rate, settings.connector_learning_rate or rate, lora)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            kind = 2 if is_lora(name) else int(module.model.is_fresh(name))
            groups.setdefault((kind, parameter.dim() >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": peaks[kind],
            "peak": peaks[kind],
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (kind, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def num_trained(module: StepModule) -> int:
    """How many numbers are trained; to be asked before an engine has divided them among the ranks."""
    return sum(parameter.numel() for _, parameter in module.named_parameters() if parameter.requires_grad)


def adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.AdamW:
    """PyTorch's AdamW in its fused form: one kernel on a GPU, nothing to compile on a CPU."""
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon, fused=True)


def set_learning_rates(optimizer: Any, factor: float) -> None:
    """Set every group's learning rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
