"""The table of training engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train.engine import Engine
from notellm2_ray.train.plain import PlainEngine
from notellm2_ray.train.zero import ZeroEngine

ENGINES: dict[str, Callable[[Any, TrainSettings, torch.device], Engine]] = {
    "plain": PlainEngine,
    "deepspeed": ZeroEngine,
}


def make_engine(module: Any, settings: TrainSettings, device: torch.device) -> Engine:
    """The engine that the settings name. The weights of ``module`` must be the same on every rank."""
    return ENGINES[settings.engine](module, settings, device)
