"""The connector C_pi: learned queries attend to the patches (Q-Former) and are mapped to the LLM's width (Table 9)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from notellm2_ray.core.settings.model import QFormerSettings


class QFormer(nn.Module):
    """Transformer over L_c learned queries; every n-th layer also attends to the patches.

    The queries are initialised from N(0, 0.02): with zeros they would all stay equal, except for dropout.
    """

    def __init__(self, settings: QFormerSettings, vision_width: int) -> None:
        super().__init__()
        config = Blip2QFormerConfig(  # type: ignore[call-arg]
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            intermediate_size=settings.intermediate_size,
            cross_attention_frequency=settings.cross_attention_every,
            encoder_hidden_size=vision_width,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
            initializer_range=_initial_deviation(settings.hidden_size),
            attn_implementation="sdpa",
        )
        self.queries = nn.Parameter(torch.empty(settings.num_queries, settings.hidden_size).normal_(0.0, 0.02))
        self.layers = Blip2QFormerModel(config)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """From patches (N, L, h_v) to query states (N, L_c, hidden_size)."""
        queries = self.queries.expand(len(patches), -1, -1)
        return self.layers(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


def _initial_deviation(width: int) -> float:
    """BERT's 0.02 at the paper's widths (768 and more); more for narrower connectors, to keep the gain per layer.

    At a width of 16, 0.02 would pass only 0.5% of the patches' signal through two projections. The visual tokens would
    be nearly the same for every image, and training would need hundreds of steps to change that.
    """
    return 0.02 * max(1.0, math.sqrt(768 / width))


class Connector(nn.Module):
    """Q-Former, then Linear, GELU, Linear to the LLM's width: E_v = C_pi(Z_v)."""

    def __init__(self, settings: QFormerSettings, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.qformer = QFormer(settings, vision_width)
        self.projector = nn.Sequential(
            nn.Linear(settings.hidden_size, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """From patches (N, L, h_v) to visual tokens (N, L_c, h_t)."""
        return self.projector(self.qformer(patches))
