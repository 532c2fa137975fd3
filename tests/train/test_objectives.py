"""The loss at several lengths of the vector (Matryoshka)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import ModelSettings, Settings, TrainSettings
from notellm2_ray.models.embedder.losses import embedder_loss
from notellm2_ray.models.embedder.vectors import NOTE, VISUAL, NoteVectors
from notellm2_ray.train.objectives import loss_of


def vectors(num: int = 6, length: int = 8) -> NoteVectors:
    generator = torch.Generator().manual_seed(0)
    named = {name: torch.randn(num, length, generator=generator) for name in (NOTE, VISUAL)}
    return NoteVectors(named, {VISUAL: torch.ones(num, dtype=torch.bool)}, torch.tensor(1.0))


def test_the_loss_is_the_mean_over_lengths():
    whole, keys = vectors(), torch.arange(6)
    loss = loss_of(ModelSettings(), TrainSettings(dimensions=(8, 4, 2)))(whole, keys)
    each = []
    for length in (8, 4, 2):
        cut = {name: values[:, :length] for name, values in whole.named.items()}
        each.append(embedder_loss(NoteVectors(cut, whole.present, whole.temperature), keys, alpha=9.0).total)
    torch.testing.assert_close(loss, sum(each) / 3)


def test_a_length_trains_only_the_first_rows_of_the_projection():
    projection, states = nn.Linear(5, 8, bias=False), torch.randn(6, 5)
    for lengths, rows in (((4,), 4), ((8, 4), 8)):
        projection.zero_grad()
        projected = NoteVectors({NOTE: projection(states)}, {}, torch.tensor(1.0))
        loss_of(ModelSettings(), TrainSettings(dimensions=lengths))(projected, torch.arange(6)).backward()
        moved = projection.weight.grad.abs().sum(dim=1) > 0
        assert moved.tolist() == [True] * rows + [False] * (8 - rows)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([32, 16], r"train.dimensions=\[32, 16\]: the largest must be model.embedding_dim \(64\)"),
        ([128, 64], "the largest must be model.embedding_dim"),
        ([64, 64], "must be different numbers"),
        ([64, 0], "numbers above 0"),
    ],
)
def test_lengths_that_do_not_fit_the_vector_are_refused(lengths, said):
    with pytest.raises(ConfigError, match=said):
        build(Settings, {"train": {"dimensions": lengths}})
