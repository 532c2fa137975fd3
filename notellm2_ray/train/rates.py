"""Default learning rates of the embedder, by the size of its pretrained models.

The paper fine-tunes seven billion parameters over some 8,000 steps at 3e-6 (Table 8). A small model learns nothing at
that rate in a run of ordinary length. Good rates fall with the size of a model; here as its number of parameters to the
power of -0.9. That is the paper's rate at its size, 1e-4 at 135 million, which docs/models.md has measurements of, and
below 20 million what the tiny models of this package learn at.

Parts that start from random values (connector, fusion, projection) have no knowledge to lose and get ten times as much.
So do the matrices of LoRA (``train.lora.learning_rate``).
"""

from __future__ import annotations

from typing import Any

from notellm2_ray.core.settings.train import TrainSettings

_PAPER_RATE, _PAPER_SIZE = 3e-6, 7e9
_HIGHEST, _HIGHEST_FRESH = 5e-4, 2e-3  # what the tiny models of this package learn at
_FRESH_FACTOR = 10


def rate_for(parameters: int) -> float:
    """Peak learning rate for fine-tuning a model of so many parameters, rounded to two digits."""
    rate = _PAPER_RATE * (_PAPER_SIZE / max(1, parameters)) ** 0.9
    return float(f"{min(rate, _HIGHEST):.1e}")


def num_pretrained(model: Any) -> int:
    """Number of a network's parameters that do not start from random values."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not model.is_fresh(name))


def with_rates(settings: TrainSettings, parameters: int) -> TrainSettings:
    """The settings with a learning rate, if they have none.

    Args:
        parameters: of the pretrained models that are trained or adapted.
    """
    if settings.learning_rate is not None:
        return settings
    rate = rate_for(parameters)
    fresh = settings.connector_learning_rate or min(_FRESH_FACTOR * rate, _HIGHEST_FRESH)
    return settings.model_copy(update={"learning_rate": rate, "connector_learning_rate": fresh})
