"""The contrastive losses against a plain implementation, over simulated ranks, and by finite differences."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from notellm2_ray.models.embedder import losses
from notellm2_ray.models.embedder.losses import PADDING, Negatives, contrastive_loss, embedder_loss
from notellm2_ray.models.embedder.vectors import NOTE, VISUAL, NoteVectors

TAU = torch.tensor(1.3, dtype=torch.float64)


def vectors(num_notes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_notes, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def twin(rows, tau, keys, mask_duplicates=True, present=None, hard=0, known=(), margin=None) -> float:
    """Eq. 1, literally, in plain Python: the last ``hard`` rows are hard negatives, ``known`` related (row, column)."""
    num = len(rows) - hard
    related = [(i + num // 2) % num for i in range(num)]
    present = present or [True] * len(rows)
    losses = []
    for i in range(num):
        if not (present[i] and present[related[i]]):
            continue
        below = 0.0
        for j in range(len(rows)):
            duplicate = keys[j] in (keys[i], keys[related[i]]) and j != related[i] and (mask_duplicates or j >= num)
            padding = j >= num and keys[j] == PADDING
            own, close = cosine(rows[i], rows[related[i]]), cosine(rows[i], rows[j])
            false = j != related[i] and margin is not None and close > own + margin
            if j != i and present[j] and not (duplicate or padding or false or (i, j) in known):
                below += math.exp(close * math.exp(tau))
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


HARD_KEYS = torch.tensor([1, 2, 3, 1, 5, 6, 7, 8, 9, 2, PADDING, 3, 10, PADDING])  # 4 pairs, then 6 hard negatives
KNOWN = [(0, 9), (4, 13), (7, 12)]


def hard(known=KNOWN, count: int = 6) -> Negatives:
    return Negatives(count, torch.tensor(known, dtype=torch.int64).reshape(-1, 2))


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("margin", [None, 0.1, -0.2])
@pytest.mark.parametrize("missing", [None, [2, 8]])
def test_hard_negatives_equal_the_plain_implementation(mask_duplicates, margin, missing):
    rows, present = vectors(14), None
    if missing:  # a query, and a hard negative, without an image
        present = torch.ones(14, dtype=torch.bool).index_fill(0, torch.tensor(missing), False)
    given = {"mask_duplicates": mask_duplicates, "present": present, "false_negative_margin": margin}
    loss = contrastive_loss(rows, TAU, HARD_KEYS, negatives=hard(), **given)
    seen = None if present is None else present.tolist()
    expected = twin(rows.tolist(), TAU.item(), HARD_KEYS.tolist(), mask_duplicates, seen, 6, KNOWN, margin)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("similarities", [1, 45])  # blocks of one row, and of three of eight
def test_blocks_of_rows_change_neither_loss_nor_gradients(monkeypatch, mask_duplicates, similarities):
    rows, temperature = vectors(14).requires_grad_(), TAU.clone().requires_grad_()
    present = torch.ones(14, dtype=torch.bool).index_fill(0, torch.tensor([2, 8]), False)
    given = {"mask_duplicates": mask_duplicates, "present": present, "false_negative_margin": 0.1}

    def measured() -> list[torch.Tensor]:
        loss = contrastive_loss(rows, temperature, HARD_KEYS, negatives=hard(), **given)
        return [loss, *torch.autograd.grad(loss, [rows, temperature])]

    whole = measured()
    monkeypatch.setattr(losses, "_MAX_SIMILARITIES", similarities)
    for found, expected in zip(measured(), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_hard_negatives_are_pushed_away_and_masked_ones_are_not():
    rows = vectors(14).requires_grad_()
    contrastive_loss(rows, TAU, HARD_KEYS, negatives=hard()).backward()
    moved = rows.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [True] * 10 + [False, True, True, False]  # the padding stays where it is
    alone = vectors(9).requires_grad_()  # one hard negative, related to every row
    everywhere = hard([(row, 8) for row in range(8)], count=1)
    contrastive_loss(alone, TAU, torch.arange(9), negatives=everywhere).backward()
    assert torch.equal(alone.grad[8], torch.zeros(5, dtype=torch.float64))


def test_without_hard_negatives_nothing_changes_bit_for_bit():
    rows, keys = vectors(10).float(), torch.tensor([1, 2, 3, 1, 5, 6, 7, 2, 6, 10])
    results = []
    for negatives in (None, hard([], count=0)):
        leaf = rows.clone().requires_grad_()
        loss = contrastive_loss(leaf, TAU.float(), keys, negatives=negatives)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_ranks_with_hard_negatives_equal_one_rank():
    """Two ranks of two pairs, with three hard negatives each."""
    both = torch.cat([vectors(14), vectors(14, 1)], dim=1).requires_grad_()
    temperature = TAU.clone().requires_grad_()
    present = torch.ones(14, dtype=torch.bool)
    present[[3, 9]] = False
    ranks = [[0, 1, 4, 5, 8, 9, 10], [2, 3, 6, 7, 11, 12, 13]]
    places = [row for rank in ranks for row in rank]  # column -> note

    def loss(rows: list[int], count: int, known, gather=None) -> torch.Tensor:
        part = NoteVectors({NOTE: both[rows, :5], VISUAL: both[rows, 5:]}, {VISUAL: present[rows]}, temperature)
        return embedder_loss(part, HARD_KEYS[rows], alpha=9.0, gather=gather, negatives=hard(known, count)).total

    whole = loss(list(range(14)), 6, KNOWN)
    known_of = [[(rank.index(row), places.index(column)) for row, column in KNOWN if row in rank] for rank in ranks]
    each = on_ranks(2, lambda rank, gather: loss(ranks[rank], 3, known_of[rank], gather))
    mean = torch.stack(each).mean()
    assert mean.item() == pytest.approx(whole.item(), abs=1e-12)
    expected = torch.autograd.grad(whole, [both, temperature])
    for found, wanted in zip(torch.autograd.grad(mean, [both, temperature]), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


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
