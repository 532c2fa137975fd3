"""The table of training engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train.engine import Engine
from notellm2_ray.train.plain import PlainEngine
from notellm2_ray.train.zero import ZeroEngine

ENGINES: dict[str, Callable[[Any, TrainSettings, torch.device, bool], Engine]] = {
    "plain": PlainEngine,
    "deepspeed": ZeroEngine,
}


def make_engine(module: Any, settings: TrainSettings, device: torch.device, *, loaded_once: bool = False) -> Engine:
    """The engine that the settings name.

    Args:
        loaded_once: whether only rank 0 has weights (:mod:`~notellm2_ray.train.one_load`), and the others are to get
            them; otherwise ``module`` must have the same weights on every rank.
    """
    return ENGINES[settings.engine](module, settings, device, loaded_once)
