"""The contrastive losses against a plain implementation, over simulated ranks, and by finite differences."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from notellm2_ray.models.embedder.losses import contrastive_loss, embedder_loss
from notellm2_ray.models.embedder.vectors import NOTE, VISUAL, NoteVectors

TAU = torch.tensor(1.3, dtype=torch.float64)


def vectors(num_notes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_notes, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def twin(rows, tau, keys, mask_duplicates=True, present=None) -> float:
    """Eq. 1, literally, in plain Python."""
    num = len(rows)
    related = [(i + num // 2) % num for i in range(num)]
    present = present or [True] * num
    losses = []
    for i in range(num):
        if not (present[i] and present[related[i]]):
            continue
        below = 0.0
        for j in range(num):
            duplicate = keys[j] in (keys[i], keys[related[i]]) and j != related[i]
            if j != i and present[j] and not (mask_duplicates and duplicate):
                below += math.exp(cosine(rows[i], rows[j]) * math.exp(tau))
        losses.append(-math.log(math.exp(cosine(rows[i], rows[related[i]]) * math.exp(tau)) / below))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("mask_duplicates", [True, False])
def test_loss_equals_the_plain_implementation(mask_duplicates):
    rows = vectors(10)
    keys = torch.tensor([1, 2, 3, 1, 5, 6, 7, 2, 6, 10])  # notes 1, 2 and 6 appear twice
    loss = contrastive_loss(rows, TAU, keys, mask_duplicates=mask_duplicates)
    assert loss.item() == pytest.approx(twin(rows.tolist(), TAU.item(), keys.tolist(), mask_duplicates), abs=1e-12)


def test_a_duplicate_is_not_a_negative():
    rows = vectors(4)
    rows[1] = rows[0]  # another copy of the first query, and so of its target
    rows[3] = rows[2]
    same = contrastive_loss(rows, TAU, torch.tensor([1, 1, 2, 2]))
    assert same.item() == pytest.approx(0.0, abs=1e-12)
    assert contrastive_loss(rows, TAU, torch.tensor([1, 1, 2, 2]), mask_duplicates=False) > 0.5


def test_rows_without_a_vector_do_not_count():
    rows = vectors(8)
    present = torch.tensor([True, True, False, True, True, True, True, False])  # pairs 2 and 3 lack one side each
    loss = contrastive_loss(rows, TAU, torch.arange(8), present=present)
    assert loss.item() == pytest.approx(twin(rows.tolist(), TAU.item(), range(8), present=present.tolist()), abs=1e-12)
    none = contrastive_loss(rows.requires_grad_(), TAU, torch.arange(8), present=torch.zeros(8, dtype=torch.bool))
    none.backward()
    assert none == 0
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def rank_rows(num_pairs: int, world: int) -> list[list[int]]:
    """Row numbers of each rank's notes (its queries, then their targets) in a batch of ``num_pairs`` pairs."""
    each = num_pairs // world
    return [[r * each + i + side * num_pairs for side in (0, 1) for i in range(each)] for r in range(world)]


def on_ranks(world: int, work) -> list[torch.Tensor]:
    """Results of ``work(rank, gather)``; every rank is a thread, and all share one autograd graph."""
    slots: list[torch.Tensor | None] = [None] * world
    barrier = threading.Barrier(world, timeout=60)

    def run(rank: int) -> torch.Tensor:
        def gather(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
            slots[rank] = rows
            barrier.wait()
            everybody = torch.cat(slots)
            barrier.wait()
            return everybody, rank * len(rows)

        return work(rank, gather)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("visual", ["all", "some", "one rank has none"])
def test_ranks_together_equal_one_rank(world, visual):
    keys = torch.tensor([1, 2, 3, 1, 5, 6, 7, 8, 9, 2, 6, 10, 11, 12, 13, 14])
    present = torch.ones(16, dtype=torch.bool)
    ranks = rank_rows(8, world)
    if visual == "some":
        present[[0, 3, 13]] = False
    elif visual == "one rank has none":
        present[ranks[0]] = False
    both = torch.cat([vectors(16), vectors(16, 1)], dim=1).requires_grad_()
    temperature = TAU.clone().requires_grad_()

    def loss(rows: list[int], gather=None) -> torch.Tensor:
        part = NoteVectors({NOTE: both[rows, :5], VISUAL: both[rows, 5:]}, {VISUAL: present[rows]}, temperature)
        return embedder_loss(part, keys[rows], alpha=9.0, gather=gather).total

    whole = loss(list(range(16)))
    mean = torch.stack(on_ranks(world, lambda rank, gather: loss(ranks[rank], gather))).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=1e-12)
    expected = torch.autograd.grad(whole, [both, temperature])
    for found, wanted in zip(torch.autograd.grad(mean, [both, temperature]), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_gradients_by_finite_differences():
    keys = torch.tensor([1, 2, 3, 1, 5, 6, 7, 8])
    present = torch.tensor([True, False, True, True, True, True, True, True])
    rows, tau = vectors(8).requires_grad_(), TAU.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, t: contrastive_loss(a, t, keys, present=present), (rows, tau), eps=1e-6, atol=1e-6
    )


def test_the_final_loss_is_equation_9():
    multimodal, visual = vectors(6).float(), vectors(6, 1).float()
    present, keys, tau = torch.ones(6, dtype=torch.bool), torch.arange(6), TAU.float()
    loss = embedder_loss(NoteVectors({NOTE: multimodal, VISUAL: visual}, {VISUAL: present}, tau), keys, alpha=3.0)
    assert loss.total.item() == pytest.approx((loss.visual.item() + 3 * loss.multimodal.item()) / 4, rel=1e-6)
    assert loss.visual.item() == pytest.approx(twin(visual.tolist(), TAU.item(), range(6)), rel=1e-5)
    alone = embedder_loss(NoteVectors({NOTE: multimodal}, {}, tau), keys, alpha=3.0)
    assert alone.visual is None
    assert alone.total.item() == loss.multimodal.item()


def test_similarity_is_in_float32_under_autocast():
    rows = vectors(64).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(rows, TAU.float(), torch.arange(64))
    assert inside.dtype == torch.float32
    assert inside.item() == contrastive_loss(rows, TAU.float(), torch.arange(64)).item()
    halves = contrastive_loss(rows.bfloat16(), TAU.float(), torch.arange(64))
    assert halves.dtype == torch.float32


def test_an_odd_number_of_notes_is_refused():
    with pytest.raises(ValueError, match="3 vectors and 3 keys"):
        contrastive_loss(vectors(3), TAU, torch.arange(3))
