"""Gated late fusion (Eq. 7): the tower's pooled image features are added to the vector after the LLM."""

from __future__ import annotations

import torch
from torch import nn


class LateFusion(nn.Module):
    """The projection of visual features to the LLM's width, and the gate, which both kinds of vectors share.

    z = sigmoid(W [v, n] + b), fused = z * v + (1 - z) * n.
    """

    def __init__(self, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.visual = nn.Linear(vision_width, llm_width, bias=False)
        self.gate = nn.Linear(2 * llm_width, llm_width)
        nn.init.xavier_uniform_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, pooled: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Fuse pooled visual features (N, h_v) with LLM states (N, h_t) into states (N, h_t)."""
        v = self.visual(pooled)
        z = torch.sigmoid(self.gate(torch.cat([v, states], dim=-1)))
        return z * v + (1 - z) * states
