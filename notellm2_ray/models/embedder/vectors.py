"""The vectors that an embedder computes: named, and some of them only for some notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from notellm2_ray.core.settings.model import ModelSettings

NOTE = "multimodal"  # the vector that notes are searched by
VISUAL = "visual"  # the vector of the visual half of an mICL prompt


class NoteVectors(NamedTuple):
    """Vectors of N notes, not normalised."""

    named: dict[str, torch.Tensor]  # name to (N, D) float32; :data:`NOTE` is always there
    present: dict[str, torch.Tensor]  # name to (N,) bool, if only some notes have the vector; the others have zeros
    temperature: torch.Tensor  # () float32, tau; returned because a sharded parameter is complete only inside forward

    @property
    def multimodal(self) -> torch.Tensor:
        """(N, D), the vector that notes are searched by."""
        return self.named[NOTE]

    @property
    def visual(self) -> torch.Tensor | None:
        """(N, D), or None if the embedder has no visual vector."""
        return self.named.get(VISUAL)

    @property
    def has_visual(self) -> torch.Tensor:
        """(N,) bool, whether each note has a visual vector."""
        none = torch.zeros(len(self.multimodal), dtype=torch.bool, device=self.multimodal.device)
        return self.present.get(VISUAL, none)

    def rows(self, rows: torch.Tensor) -> NoteVectors:
        """The vectors of some of the notes: (M,) int64."""
        named = {name: values[rows] for name, values in self.named.items()}
        return NoteVectors(named, {name: values[rows] for name, values in self.present.items()}, self.temperature)

    def first(self, dimensions: int) -> NoteVectors:
        """The vectors cut to their first numbers."""
        return self._replace(named={name: values[:, :dimensions] for name, values in self.named.items()})


def join_vectors(parts: Sequence[NoteVectors], order: torch.Tensor | None = None) -> NoteVectors:
    """Concatenate the vectors of several batches.

    Args:
        order: (N,) int64; row i of the result is row ``order[i]`` of the concatenated parts.
    """
    named = {name: torch.cat([part.named[name] for part in parts]) for name in parts[0].named}
    present = {name: torch.cat([part.present[name] for part in parts]) for name in parts[0].present}
    joined = NoteVectors(named, present, parts[-1].temperature)
    return joined if order is None else joined.rows(order)


def projection(width: int, settings: ModelSettings) -> nn.Module:
    """The last layer, from states ``width`` wide to vectors: linear without bias, or none."""
    return nn.Identity() if settings.embedding_dim is None else nn.Linear(width, settings.embedding_dim, bias=False)
