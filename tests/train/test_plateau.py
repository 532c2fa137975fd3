"""A run whose loss stays at that of equal vectors is noticed within fifty steps."""

import math

import pytest
import torch

from notellm2_ray.models.embedder.losses import contrastive_loss
from notellm2_ray.train.plateau import Plateau


def warnings(losses, total=1000, pairs=16):
    plateau = Plateau(pairs, total)
    return [text for text in (plateau.warning(step, loss) for step, loss in enumerate(losses)) if text]


def test_the_level_is_the_loss_of_equal_vectors():
    loss = contrastive_loss(torch.ones(32, 8), torch.tensor(3.0), torch.arange(32))
    assert float(loss) == pytest.approx(Plateau(16, 100).level, abs=1e-5)


def test_one_warning_after_fifty_steps_on_the_plateau():
    told = warnings([math.log(31)] * 200)
    assert len(told) == 1 and "after 50 steps" in told[0] and "3.434" in told[0] and "train.learning_rate" in told[0]


def test_a_short_run_is_judged_at_its_end():
    assert "after 30 steps" in warnings([math.log(31)] * 30, total=30)[0]


@pytest.mark.parametrize("last", [3.3, 2.0, 0.1])
def test_none_for_a_run_that_learns(last):
    assert not warnings([math.log(31) + (last - math.log(31)) * min(1, step / 40) for step in range(100)])
