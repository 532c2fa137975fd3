"""Floating-point operations of the embedder, by formula; a multiplication and an addition count as two.

A linear map of n inputs to m outputs costs 2nm a row. Norms, activations, softmax and rotations are left out: they are
well under 1% of the operations, and none of them runs on the matrix units whose rate is the measure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from notellm2_ray.core.settings import ModelSettings, QFormerSettings


class NoteFlops(NamedTuple):
    """Forward operations of one note."""

    llm: int
    tower: int
    connector: int
    fusion: int

    @property
    def forward(self) -> int:
        return sum(self)

    @property
    def training(self) -> int:
        """Operations of one note in a training step.

        The backward pass of a trained map takes two products of the forward one's size, one for its input and one for
        its weights. The frozen tower has no backward pass. What gradient checkpointing computes again is not counted,
        so that rates with and without it are of the same work.
        """
        return 3 * (self.llm + self.connector + self.fusion) + self.tower


def count(settings: ModelSettings, llm: Any, vision: Any, num_tokens: int) -> NoteFlops:
    """Operations of the ``notellm2`` variant for a note with an image and a prompt of ``num_tokens``.

    Args:
        llm, vision: Hugging Face configurations.
    """
    patches = (vision.image_size // vision.patch_size) ** 2
    return NoteFlops(
        _llm(llm, num_tokens),
        _tower(vision, patches),
        _connector(settings.qformer, patches, vision.hidden_size, llm.hidden_size),
        _fusion(vision.hidden_size, llm.hidden_size, settings.embedding_dim),
    )


def _llm(config: Any, tokens: int) -> int:
    """Operations of the LLM: gated feed-forward (three maps), queries and output of width q, narrower keys and values.

    A token attends to itself and to those before it: T(T+1)/2 pairs, each of 2q for the score and 2q for the value.
    There is no output layer over the vocabulary.
    """
    h, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or h // heads
    queries, keys = heads * head, config.num_key_value_heads * head
    maps = 2 * tokens * (2 * h * queries + 2 * h * keys + 3 * h * inner)
    attention = 4 * queries * tokens * (tokens + 1) // 2
    return config.num_hidden_layers * (maps + attention)


def _tower(config: Any, patches: int) -> int:
    """Operations of the vision tower: a map of each patch's pixels, then layers over the patches and CLS.

    A layer has four maps in attention and two in the feed-forward part.
    """
    h, inner, tokens = config.hidden_size, config.intermediate_size, patches + 1
    layer = 2 * tokens * (4 * h * h + 2 * h * inner) + 4 * h * tokens**2
    return 2 * patches * 3 * config.patch_size**2 * h + config.num_hidden_layers * layer


def _connector(settings: QFormerSettings, patches: int, vision_width: int, llm_width: int) -> int:
    """Operations of the connector: layers over the queries, and a projector.

    Every n-th layer also reads the patches, with keys and values mapped from the tower's width.
    """
    d, queries = settings.hidden_size, settings.num_queries
    layer = 2 * queries * (4 * d * d + 2 * d * settings.intermediate_size) + 4 * d * queries**2
    crossing = 2 * (2 * queries * d * d + 2 * patches * vision_width * d) + 4 * d * queries * patches
    crossings = -(-settings.num_layers // settings.cross_attention_every)
    projector = 2 * queries * (d * llm_width + llm_width**2)
    return settings.num_layers * layer + crossings * crossing + projector


def _fusion(vision_width: int, llm_width: int, embedding_dim: int) -> int:
    """Operations of late fusion and projection, for the visual and the multimodal vector.

    The tower's vector is mapped to h_t, the gate reads both, and the result is projected.
    """
    return 2 * 2 * (vision_width * llm_width + 2 * llm_width * llm_width + llm_width * embedding_dim)
