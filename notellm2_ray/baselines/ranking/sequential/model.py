"""GRU4Rec and SASRec as modules: from a user's notes to a vector at each position that predicts the next note.

Sizes are RecBole's defaults (recbole/properties/model/{GRU4Rec,SASRec}.yaml). Items are numbered: 0 is padding, 1 is
any unknown note, and known notes start at 2. Sequences are padded on the right.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

Architecture = Literal["gru4rec", "sasrec"]
PAD, UNKNOWN, FIRST_NOTE = 0, 1, 2
WIDTH = 64


class IdEmbedding(nn.Module):
    """A learned vector per item."""

    def __init__(self, num_items: int, width: int = WIDTH) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, width, padding_idx=PAD)
        nn.init.normal_(self.items.weight, std=0.02)
        with torch.no_grad():
            self.items.weight[PAD] = 0

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """(...) int64 to (..., D)."""
        return self.items(items)


class FeatureEmbedding(nn.Module):
    """A learned linear map of a frozen feature vector per note; padding and the unknown note have learned vectors."""

    features: torch.Tensor

    def __init__(self, features: torch.Tensor, width: int = WIDTH) -> None:
        """Take the (N, F) float32 features of notes FIRST_NOTE, FIRST_NOTE + 1, ...; they are standardised here."""
        super().__init__()
        spread, mean = torch.std_mean(features, dim=0, correction=0)
        standard = (features - mean) / spread.clamp_min(1e-6)
        blank = torch.zeros(FIRST_NOTE, features.shape[1])
        self.register_buffer("features", torch.cat([blank, standard]), persistent=False)
        self.linear = nn.Linear(features.shape[1], width)
        # The vectors start as small as those of IdEmbedding.
        nn.init.normal_(self.linear.weight, std=0.1 / features.shape[1] ** 0.5)
        nn.init.zeros_(self.linear.bias)
        self.special = nn.Embedding(FIRST_NOTE, width, padding_idx=PAD)
        nn.init.normal_(self.special.weight, std=0.02)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """(...) int64 to (..., D)."""
        special = self.special(items.clamp_max(UNKNOWN))
        return torch.where((items < FIRST_NOTE)[..., None], special, self.linear(self.features[items]))


class SequentialModel(nn.Module):
    """An item embedding, shared by input and output, and a causal encoder between them."""

    def __init__(self, architecture: Architecture, embedding: nn.Module, max_length: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.encoder = _Gru() if architecture == "gru4rec" else _CausalAttention(max_length)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """(B, L) items to (B, L, D) states; a state depends on no later item."""
        return self.encoder(self.embedding(items))


class _Gru(nn.Module):
    """GRU4Rec: one layer of 128, dropout .3 on its input, a linear layer back to the items' width."""

    def __init__(self, width: int = WIDTH, hidden: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(width, hidden, bias=False, batch_first=True)
        self.out = nn.Linear(hidden, width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.dropout(vectors))
        return self.out(states)


class _CausalAttention(nn.Module):
    """SASRec: learned positions, two layers of two heads, inner width 256, GELU, dropout .5."""

    def __init__(
        self,
        max_length: int,
        width: int = WIDTH,
        layers: int = 2,
        heads: int = 2,
        inner: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_length, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(width, heads, inner, dropout, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        length = vectors.shape[1]
        states = vectors + self.positions(torch.arange(length, device=vectors.device))
        # Padding follows the notes, so the causal mask is enough to keep it out of their states.
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=vectors.device)
        return self.layers(self.dropout(self.norm(states)), mask=mask, is_causal=True)
