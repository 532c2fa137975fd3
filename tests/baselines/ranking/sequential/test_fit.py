"""GRU4Rec and SASRec: they learn, look only back, and know what they do not know."""

import itertools

import numpy as np
import pytest
import torch

from notellm2_ray.baselines.ranking.sequential.fit import fit
from notellm2_ray.baselines.ranking.sequential.model import (
    FeatureEmbedding,
    IdEmbedding,
    SequentialModel,
)
from notellm2_ray.baselines.ranking.sequential.recommender import FrozenFeatures
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.core.settings.baselines import GRID, Gru4RecSettings, SasRecSettings, points

ARCHITECTURES = (Gru4RecSettings, SasRecSettings)
NOTES = [f"n{at}" for at in range(12)]


def cycles(count=48, length=6):
    """Each user who saw note i sees note i + 1 next."""
    return [[NOTES[(start + step) % 12] for step in range(length)] for start in range(count)]


def next_note_accuracy(model):
    wins = 0
    for start in range(12):
        (scores,) = model.scores([[NOTES[start], NOTES[(start + 1) % 12]]], [NOTES])
        wins += NOTES[int(scores.argmax())] == NOTES[(start + 2) % 12]
    return wins / 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_set_is_learned_and_the_same_seed_gives_the_same_model(architecture):
    settings = architecture(max_epochs=60, learning_rate=5e-3)
    validation = [(NOTES[at : at + 2], NOTES[at + 2]) for at in range(10)]
    state = torch.random.get_rng_state()
    model = fit(settings, cycles(), validation, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert max(model.validation_auc) > 0.9
    assert next_note_accuracy(model) > 0.9
    again = fit(settings, cycles(), validation, seed=1)
    assert again.validation_auc == model.validation_auc
    np.testing.assert_array_equal(again.scores([NOTES[:3]], [NOTES])[0], model.scores([NOTES[:3]], [NOTES])[0])


@pytest.mark.parametrize(("architecture", "by_features"), itertools.product(ARCHITECTURES, (False, True)))
def test_later_notes_and_padding_change_no_earlier_state(architecture, by_features):
    torch.manual_seed(0)
    embedding = FeatureEmbedding(torch.randn(18, 5), 64) if by_features else IdEmbedding(20, 64)
    model = SequentialModel(architecture(max_length=8), embedding).eval()
    first = torch.tensor([[2, 3, 4, 5, 6]])
    other = torch.tensor([[2, 3, 4, 9, 1]])
    padded = torch.tensor([[2, 3, 4, 0, 0]])
    states = model(first)[0, :3]
    torch.testing.assert_close(model(other)[0, :3], states)
    torch.testing.assert_close(model(padded)[0, :3], states)
    assert not torch.allclose(model(other)[0, 3], model(first)[0, 3])


def test_unknown_notes_tie_and_stand_below_what_was_learned():
    model = fit(Gru4RecSettings(max_epochs=20, learning_rate=5e-3), cycles(), [], seed=1)
    unseen, also, likely = model.scores([["n0", "n1"]], [["new", "newer", "n2"]])[0]
    assert unseen == also
    assert unseen < likely
    after_unknown, after_nothing = model.scores([["new"], []], [NOTES, NOTES])
    np.testing.assert_array_equal(after_unknown, after_nothing)


def test_one_by_one_is_the_batch_and_only_the_last_notes_are_read():
    model = fit(SasRecSettings(max_epochs=2, max_length=4), cycles(), [], seed=1)
    histories = [NOTES[:7], NOTES[3:7], NOTES[6:7]]
    together = model.scores(histories, [NOTES] * 3)
    for history, scores in zip(histories, together, strict=True):
        np.testing.assert_allclose(model.scores([history], [NOTES])[0], scores, atol=1e-5)
    np.testing.assert_allclose(together[0], together[1], atol=1e-5)


def test_features_carry_over_to_notes_that_no_sequence_holds():
    rng = np.random.default_rng(0)
    kinds = np.eye(3, dtype=np.float32)
    ids = [f"k{at % 3}-{at}" for at in range(60)]
    matrix = kinds[[at % 3 for at in range(60)]] + rng.normal(0, 0.05, (60, 3)).astype(np.float32)
    held_out = set(ids[54:])
    fans = [[note for note in rng.permutation(ids[kind::3]) if note not in held_out][:6] for kind in (0, 1, 2) * 20]
    settings = Gru4RecSettings(max_epochs=15, learning_rate=5e-3)
    model = fit(settings, fans, [], seed=1, features=FrozenFeatures(ids, matrix))
    for kind in range(3):
        candidates = ids[54:57]  # one of each kind, none in any sequence
        (scores,) = model.scores([ids[kind : kind + 9 : 3]], [candidates])
        assert int(scores.argmax()) == kind
    (scores,) = model.scores([ids[:2]], [["no features", "none either"]])
    assert scores[0] == scores[1]


def test_more_notes_than_classes_are_sampled():
    settings = Gru4RecSettings(max_epochs=60, learning_rate=5e-3, max_classes=6)
    assert next_note_accuracy(fit(settings, cycles(), [], seed=1)) > 0.9


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(DataError, match="two notes or more"):
        fit(SasRecSettings(), [["a"], []], [], seed=1)
    with pytest.raises(DataError, match="usable notes"):
        features = FrozenFeatures(["c"], np.ones((1, 2), dtype=np.float32))
        fit(SasRecSettings(), [["a", "b"]], [], seed=1, features=features)


def test_sizes_are_settings_and_the_grid_is_every_combination():
    assert len(points(SasRecSettings(), GRID)) == 8
    small = Gru4RecSettings(width=6, hidden=5)
    sizes = SequentialModel(small, IdEmbedding(20, 6)).state_dict()
    assert sizes["encoder.gru.weight_hh_l0"].shape == (15, 5)
    assert sizes["encoder.out.weight"].shape == (6, 5)
    with pytest.raises(ValueError, match=r"baseline_grid does not fit gru4rec.*'widht'; did you mean 'width'"):
        RankEvaluateSettings(baseline_grid={"widht": (1, 2)})
    with pytest.raises(ValueError, match=r"baseline_grid does not fit sasrec.*multiple of heads"):
        RankEvaluateSettings(baseline_grid={"width": (63,)})
