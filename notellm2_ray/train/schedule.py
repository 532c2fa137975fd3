"""How many steps a run has, and the learning rate of each."""

from __future__ import annotations

from notellm2_ray.core.settings.train import TrainSettings


def num_steps(settings: TrainSettings, steps_per_epoch: int) -> int:
    """Steps of the whole run: all epochs, or ``max_steps`` where that is less."""
    steps = settings.epochs * steps_per_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """What the peak learning rate is multiplied by in ``step`` (from 0) of ``total``.

    Linear from 1/warm-up to 1 over the first ``warmup_ratio`` of the steps, then linear towards 0, which would be
    reached in the step after the last: no step of a run is wasted on a rate of zero.
    """
    warmup = round(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)
