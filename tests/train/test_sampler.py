"""Schedule, order of the pairs and validation, without a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.train.sampler import PairSampler
from notellm2_ray.train.schedule import learning_rate_factor, num_steps


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": "plain", "offload": "optimizer"}, "train.offload is DeepSpeed's.* set train.offload=none"),
        ({"zero_stage": 2, "offload": "parameters_and_optimizer"}, "needs train.zero_stage=3"),
        ({"zero_stage": 0, "offload": "optimizer"}, "needs train.zero_stage 1, 2 or 3"),
        ({"batch_pairs": 9, "num_workers": 2}, "must be a multiple of train.num_workers"),
    ],
)
def test_contradicting_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        build(TrainSettings, values)


def test_learning_rate_warms_up_and_decays_to_zero():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[12] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(1 / 16)
    assert learning_rate_factor(20, 20, 0.2) == 0.0
    assert learning_rate_factor(0, 1, 0.0) == 1.0


def test_a_run_ends_with_its_epochs_or_its_steps():
    assert num_steps(TrainSettings(epochs=3), 7) == 21
    assert num_steps(TrainSettings(epochs=3, max_steps=10), 7) == 10


class FakePairs:
    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs

    def __len__(self) -> int:
        return self.num_pairs


@given(num_pairs=st.integers(8, 200), world_size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 5))
def test_an_epoch_deals_every_pair_once_and_the_ranks_share_a_step(num_pairs, world_size, seed):
    whole = PairSampler(FakePairs(num_pairs), 8, seed)
    ranks = [PairSampler(FakePairs(num_pairs), 8, seed, rank, world_size) for rank in range(world_size)]
    steps = whole.steps_per_epoch
    for step in range(2 * steps):
        assert np.array_equal(whole.rows(step), np.concatenate([rank.rows(step) for rank in ranks]))
    dealt = np.concatenate([whole.rows(step) for step in range(steps)])
    assert len(set(dealt)) == len(dealt) == num_pairs // 8 * 8


def test_order_follows_from_seed_and_epoch():
    first, again, other = (PairSampler(FakePairs(100), 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows(3), again.rows(3))
    assert not np.array_equal(first.rows(3), other.rows(3))
    assert not np.array_equal(first.rows(0), first.rows(2))


def test_too_few_pairs_for_a_batch_say_so():
    with pytest.raises(DataError, match=r"7 training pairs do not fill one batch of train.batch_pairs=8"):
        PairSampler(FakePairs(7), 8, 0)


def test_validation_masks_duplicates_as_training_does():
    import torch

    from notellm2_ray.core.settings import ModelSettings, TrainSettings
    from notellm2_ray.models.embedder.losses import embedder_loss
    from notellm2_ray.models.embedder.vectors import NOTE, VISUAL, NoteVectors
    from notellm2_ray.train.objectives import loss_of
    from notellm2_ray.train.validation import Validation

    class Repeated(FakePairs):  # the first note is in every pair
        keys = np.array([[0, 1], [0, 2], [0, 3]])
        note_ids = ("a", "b", "c", "d")

    vectors = NoteVectors(
        {NOTE: torch.randn(4, 8), VISUAL: torch.randn(4, 8)},
        {VISUAL: torch.ones(4, dtype=torch.bool)},
        torch.tensor(1.0),
    )
    losses = []
    for masked in (True, False):
        loss = loss_of(ModelSettings(), TrainSettings(mask_duplicates=masked))
        validation = Validation(Repeated(3), None, max_pairs=9, batch_pairs=3, loss=loss, seed=0, prefetch=0)
        keys = torch.from_numpy(validation.keys.T.reshape(-1).copy())
        expected = embedder_loss(vectors.rows(keys), keys, alpha=9.0, mask_duplicates=masked).total
        losses.append(validation._score(vectors).loss)
        assert losses[-1] == pytest.approx(float(expected))
    assert losses[0] < losses[1]
