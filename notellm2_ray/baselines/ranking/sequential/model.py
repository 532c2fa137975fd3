"""GRU4Rec and SASRec as modules: from a user's notes to a vector at each position that predicts the next note.

Default sizes are RecBole's (recbole/properties/model/{GRU4Rec,SASRec}.yaml). Items are numbered: 0 is padding, 1 is
any unknown note, and known notes start at 2. Sequences are padded on the right.
"""

from __future__ import annotations

import torch
from torch import nn

from notellm2_ray.core.settings.baselines import Gru4RecSettings, SasRecSettings, SequentialSettings

PAD, UNKNOWN, FIRST_NOTE = 0, 1, 2


class IdEmbedding(nn.Module):
    """A learned vector per item."""

    def __init__(self, num_items: int, width: int) -> None:
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

    def __init__(self, features: torch.Tensor, width: int) -> None:
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

    def __init__(self, settings: SequentialSettings, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        if isinstance(settings, Gru4RecSettings):
            self.encoder: nn.Module = _Gru(settings)
        else:
            assert isinstance(settings, SasRecSettings)
            self.encoder = _CausalAttention(settings)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """(B, L) items to (B, L, D) states; a state depends on no later item."""
        return self.encoder(self.embedding(items))


class _Gru(nn.Module):
    """GRU4Rec: one recurrent layer, dropout on its input, a linear layer back to the items' width."""

    def __init__(self, settings: Gru4RecSettings) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.dropout)
        self.gru = nn.GRU(settings.width, settings.hidden, bias=False, batch_first=True)
        self.out = nn.Linear(settings.hidden, settings.width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.dropout(vectors))
        return self.out(states)


class _CausalAttention(nn.Module):
    """SASRec: learned positions, causal attention, GELU."""

    def __init__(self, settings: SasRecSettings) -> None:
        super().__init__()
        width, dropout = settings.width, settings.dropout
        self.positions = nn.Embedding(settings.max_length, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, settings.inner, dropout, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        length = vectors.shape[1]
        states = vectors + self.positions(torch.arange(length, device=vectors.device))
        # Padding follows the notes, so the causal mask is enough to keep it out of their states.
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=vectors.device)
        return self.layers(self.dropout(self.norm(states)), mask=mask, is_causal=True)
