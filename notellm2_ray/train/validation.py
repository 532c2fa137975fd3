"""Recall and loss on held-out pairs during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from notellm2_ray.core.run import stream_seed
from notellm2_ray.evaluate.recall.metrics import target_ranks
from notellm2_ray.models.embedder.vectors import NoteVectors, join_vectors
from notellm2_ray.train import distributed
from notellm2_ray.train.batches import NotePreparer, prefetched
from notellm2_ray.train.objectives import Loss
from notellm2_ray.train.pairs import Pairs
from notellm2_ray.train.step import EmbedderStep

CUTOFF = 10


class ValidationScore(NamedTuple):
    """The figures of a validation."""

    recall: (
        float  # Recall@10 of the targets among the validation notes without the query; ties count against the target
    )
    loss: float  # Eq. 9, over batches as large as in training


class Validation:
    """A fixed sample of the validation pairs. Every rank encodes its share of their notes."""

    def __init__(
        self,
        pairs: Pairs,
        prepare: NotePreparer,
        *,
        max_pairs: int,
        batch_pairs: int,
        loss: Loss,
        seed: int,
        prefetch: int,
    ) -> None:
        """Choose the pairs.

        Args:
            max_pairs: the most pairs to use.
            batch_pairs: pairs in a batch of the validation loss; all ranks together encode twice as many notes at once.
            loss: the one that training minimises.
        """
        self._prepare, self._prefetch, self._batch_pairs = prepare, prefetch, batch_pairs
        self._loss = loss
        rng = np.random.default_rng(stream_seed(seed, "train", "validation"))
        order = rng.permutation(len(pairs))[:max_pairs]
        used, keys = np.unique(pairs.keys[order], return_inverse=True)
        self._note_ids = [pairs.note_ids[key] for key in used]
        self.keys = keys.reshape(-1, 2)  # (num_pairs, 2), positions in the validation notes

    def __len__(self) -> int:
        return len(self.keys)

    def score(self, module: EmbedderStep, device: torch.device) -> ValidationScore:
        """Encode and score the notes; every rank must call it and gets the same. The module ends in training mode."""
        module.eval()
        # Only the outermost module stays in training mode. There it only makes a batch without images go through the
        # vision tower as well: if the tower is sharded, the other ranks wait for this.
        module.model.training = True
        with torch.no_grad():
            vectors = self._vectors(module, device)
            score = self._score(vectors) if distributed.rank() == 0 else None
        module.train()
        return distributed.from_rank_zero(score)

    def _vectors(self, module: EmbedderStep, device: torch.device) -> NoteVectors:
        """Vectors of all validation notes, in order, on every rank's CPU."""
        mine, world_size = self._shares(), distributed.world_size()
        parts = []
        for notes in prefetched(self._prepare, mine, self._prefetch):
            notes = notes.evened()
            part: NoteVectors = module(notes.groups, notes.positions.to(device))
            parts.append(_gathered(part))
        # Rank r encoded notes r, r + world_size, ... of each round.
        size = self._notes_per_rank()
        rows = np.concatenate(
            [
                turn * size * world_size + np.arange(size * world_size).reshape(world_size, size).T.ravel()
                for turn in range(len(parts))
            ]
        )[: len(self._note_ids)]
        return join_vectors(parts, torch.from_numpy(rows))

    def _notes_per_rank(self) -> int:
        return max(1, min(2 * self._batch_pairs, len(self._note_ids)) // distributed.world_size())

    def _shares(self) -> Iterator[list[str]]:
        """This rank's notes of each round, equally many on every rank: the last note is repeated to fill a round."""
        size, world_size = self._notes_per_rank(), distributed.world_size()
        for begin in range(0, len(self._note_ids), size * world_size):
            places = begin + distributed.rank() + world_size * np.arange(size)
            yield [self._note_ids[place] for place in np.minimum(places, len(self._note_ids) - 1)]

    def _score(self, vectors: NoteVectors) -> ValidationScore:
        losses = [self._loss(vectors.rows(keys), keys) for keys in self._batches()]
        return ValidationScore(self._recall(vectors.multimodal), float(torch.stack(losses).mean()))

    def _batches(self) -> Iterator[torch.Tensor]:
        """Keys (2b,) of each batch of pairs, queries first. Pairs beyond the last full batch are left out."""
        size = min(self._batch_pairs, len(self.keys))
        for begin in range(0, len(self.keys) - size + 1, size):
            yield torch.from_numpy(self.keys[begin : begin + size].T.reshape(-1).copy())

    def _recall(self, vectors: torch.Tensor) -> float:
        unit = torch.nn.functional.normalize(vectors.float(), dim=-1).numpy()
        query, target = self.keys.T
        return float(np.mean(target_ranks(unit[query], unit, query, target) <= CUTOFF))


def _gathered(vectors: NoteVectors) -> NoteVectors:
    """The rows of all ranks, on the CPU."""

    def from_all_ranks(rows: torch.Tensor) -> torch.Tensor:
        return distributed.gather_rows(rows)[0].cpu()

    named = {name: from_all_ranks(values) for name, values in vectors.named.items()}
    present = {name: from_all_ranks(values) for name, values in vectors.present.items()}
    return NoteVectors(named, present, vectors.temperature.detach().float().cpu())
