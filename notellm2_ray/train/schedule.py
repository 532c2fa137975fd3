"""The number of steps of a run, and the learning rate of each step."""

from __future__ import annotations

from notellm2_ray.core.settings.train import TrainSettings


def num_steps(settings: TrainSettings, steps_per_epoch: int) -> int:
    """Steps of the whole run: all epochs, or ``max_steps`` if that is less."""
    steps = settings.epochs * steps_per_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """The factor on the peak learning rate in ``step`` (counted from 0) of ``total``.

    It rises linearly to 1 over the first ``warmup_ratio`` of the steps, then falls linearly. It would reach 0 in the
    step after the last, so that no step has a learning rate of zero.
    """
    warmup = round(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)
