"""Gradient caching gives the gradients of the whole batch, with any dropout, engine and number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from notellm2_ray.train.gradient_cache import begin_step, pass_seeds
from tests.support import embedder_training as material
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> Path:
    return material.write(tmp_path_factory.mktemp("material"))


class Seeded(NamedTuple):
    """A group of notes that is given a seed of its own when its turn comes, as a pass of the cache is."""

    batch: Any
    seed: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        torch.manual_seed(self.seed)
        return self.batch.to(device)


def taken(directory: Path, *, cached: bool, ranks: int = 1, **changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """A step with dropout, cached or not: the loss, and the gradients as averaged over ranks."""
    from notellm2_ray.train.distributed import mean_over_ranks

    changes = {"cached_notes_per_pass": 3, "max_grad_norm": 1e9, **changes}
    settings = material.train_settings(num_workers=ranks, **changes)
    run = material.Run(directory, settings, material.model_settings(dropout=0.3))
    run.module.model.set_gradient_checkpointing(settings.gradient_checkpointing)
    with torch.no_grad():
        run.module.model.temperature.fill_(1.0)  # so that its gradient is far from zero
    batch = run.sampler[0]
    notes = run.prepare(batch.note_ids)
    torch.manual_seed(5)
    if not cached:
        notes = notes.evened()
        seeds = pass_seeds(len(notes.groups))
        notes = notes._replace(groups=[Seeded(*pair) for pair in zip(notes.groups, seeds, strict=True)])
    keys = torch.from_numpy(batch.note_keys)
    out, update = begin_step(run.engine, notes, keys, batch.negatives, cached=cached)
    assert len(notes.groups) > 1
    with gradients_before_update(run) as gradients:
        update(1.0)
    return mean_over_ranks(out.loss), gradients


@contextmanager
def gradients_before_update(run: material.Run) -> Iterator[dict[str, torch.Tensor]]:
    """Filled with every trained parameter's gradient as soon as the engine has it whole."""
    found: dict[str, torch.Tensor] = {}
    named = [(name, p) for name, p in run.module.model.named_parameters() if p.requires_grad]
    if run.settings.engine == "plain":
        target, method = run.engine._optimizer, "step"

        def gradient(parameter: Any) -> torch.Tensor:
            return parameter.grad
    else:
        from deepspeed.utils import safe_get_full_grad

        target, method, gradient = run.engine._engine, "_take_model_step", safe_get_full_grad
    original = getattr(target, method)

    def first_look(*arguments: Any, **named_arguments: Any) -> Any:
        found.update({name: gradient(parameter).detach().clone() for name, parameter in named})
        return original(*arguments, **named_arguments)

    with mock.patch.object(target, method, first_look):
        yield found
    assert found


def assert_same(cached: tuple[float, dict], whole: tuple[float, dict], *, atol: float = 1e-5) -> None:
    assert cached[0] == pytest.approx(whole[0], abs=atol)
    assert cached[1].keys() == whole[1].keys()
    assert abs(cached[1]["temperature"]) > 1e-3
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cached[1][name], gradient, atol=atol, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cached_notes_per_pass": None, "cached_tokens_per_pass": 150},
        {"cached_tokens_per_pass": 150},
        {"gradient_checkpointing": True},
        {"mask_duplicates": False},
        {"hard_negatives": 2, "false_negative_margin": 0.1},
    ],
    ids=lambda changes: ", ".join(changes) or "notes",
)
def test_cached_gradients_are_those_of_the_whole_batch(trained_on, changes):
    assert_same(taken(trained_on, cached=True, **changes), taken(trained_on, cached=False, **changes))


def test_bfloat16_differs_by_rounding(trained_on):
    cached, whole = (taken(trained_on, cached=cached, precision="bf16") for cached in (True, False))
    assert cached[0] == pytest.approx(whole[0], abs=1e-5)  # the same forward pass
    apart = sum(float((cached[1][name] - gradient).square().sum()) for name, gradient in whole[1].items())
    assert (apart / sum(float(gradient.square().sum()) for gradient in whole[1].values())) ** 0.5 < 0.01


@pytest.mark.parametrize(("max_notes", "max_tokens"), [(3, None), (None, 150), (3, 150)])
def test_passes_keep_their_limits(trained_on, max_notes, max_tokens):
    settings = material.train_settings(cached_notes_per_pass=max_notes, cached_tokens_per_pass=max_tokens)
    run = material.Run(trained_on, settings)
    notes = run.prepare(run.sampler[0].note_ids)
    shapes = [tuple(group.input_ids.shape) for group in notes.groups]
    assert notes.sizes == [rows for rows, _ in shapes] and sum(notes.sizes) == len(notes.note_ids)
    assert sorted(notes.positions.tolist()) == list(range(len(notes.note_ids)))
    assert all(
        rows <= (max_notes or rows) and rows * tokens <= (max_tokens or rows * tokens) for rows, tokens in shapes
    )
    assert [tokens for _, tokens in shapes] == sorted(tokens for _, tokens in shapes)


# --- two ranks ------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "plain, other passes": {"engine": "plain"},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "zero3, other passes": {"engine": "deepspeed", "zero_stage": 3},
}


def _both_ways(directory: str) -> dict[str, list]:
    from notellm2_ray.train.distributed import rank

    def both(name: str) -> list:
        # Ranks whose notes fill different numbers of passes, as can be with a limit of tokens.
        notes_per_pass = 2 + 3 * rank() if "other" in name else 3
        case = {**CASES[name], "cached_notes_per_pass": notes_per_pass}
        return [taken(Path(directory), cached=cached, ranks=2, **case) for cached in (True, False)]

    return {name: both(name) for name in CASES}


@pytest.fixture(scope="module")
def two_ranks(trained_on, tmp_path_factory) -> list[dict[str, list]]:
    return run_ranks(_both_ways, 2, tmp_path_factory.mktemp("ranks"), str(trained_on))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks_too(two_ranks, case):
    for rank in two_ranks:
        assert_same(*rank[case])
