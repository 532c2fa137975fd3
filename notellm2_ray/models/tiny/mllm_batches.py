"""Exercises as tokens, pictures as patches, and one forward pass over a batch of both.

The library's forward pass of Qwen2-VL goes through pictures and rows one by one in Python. All pictures have one size
here, so the same sums can be done at once. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.images import decode_image
from notellm2_ray.models.tiny.mllm_files import MERGE, PATCH

_AT_ONCE = 256


class Row(NamedTuple):
    """One exercise, tokenised."""

    ids: list[int]  # prompt, in which an image has its full number of tokens, and answer
    begin: int  # position where the answer begins
    image: int | None  # number of the drawing


class Pictures:
    """Drawings of one size as patches in memory.

    Attributes:
        patches: (N, P, 3 * PATCH * PATCH) uint8, in the order of the vision tower.
        grid: patches down and across.
        tokens: visual tokens of a picture.
    """

    def __init__(self, images: Sequence[bytes], processor: Qwen2VLProcessor) -> None:
        """Decode and resize the images as the processor does.

        Raises:
            DataError: an image cannot be decoded, or the images differ in size.
        """
        process = processor.image_processor
        self.mean, self.deviation = (
            torch.tensor(values).view(3, 1).expand(3, PATCH * PATCH).flatten()
            for values in (process.image_mean, process.image_std)
        )
        parts = [self._patches(process, images[i : i + _AT_ONCE]) for i in range(0, len(images), _AT_ONCE)]
        self.patches = torch.cat([patches for patches, _ in parts])
        self.grid = parts[0][1]
        self.tokens = self.grid[0] * self.grid[1] // MERGE**2

    @staticmethod
    def _patches(process: Any, images: Sequence[bytes]) -> tuple[Tensor, tuple[int, int]]:
        decoded = [decode_image(image, 4096) for image in images]
        found = process(decoded, do_rescale=False, do_normalize=False, return_tensors="pt")
        grids = {tuple(grid) for grid in found["image_grid_thw"].tolist()}
        if len(grids) != 1:
            raise DataError(f"the drawings have {len(grids)} different sizes: draw all of them in one size")
        _, down, across = grids.pop()
        # Both frames of a still picture are the same.
        frames = found["pixel_values"].view(len(images), down * across, 3, 2, PATCH * PATCH)
        return frames[:, :, :, 0].flatten(2).to(torch.uint8), (down, across)

    def inputs(self, index: Sequence[int]) -> Tensor:
        """Normalised patches of the drawings ``index``: (len(index), P, 3 * PATCH * PATCH) float32."""
        return (self.patches[torch.tensor(index)].float() / 255 - self.mean) / self.deviation


def encode_pictures(visual: Any, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The vision tower over pictures of one size.

    Args:
        visual: Qwen2-VL's vision tower.
        patches: (B, P, 3 * PATCH * PATCH), of one frame.
        grid: patches down and across.

    Returns:
        (B, P / MERGE**2, width of the LM).
    """
    count, num_patches, _ = patches.shape
    # A still picture is the same frame twice: its convolution is a product with the weights' sum over the frames.
    hidden = nn.functional.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
    angles = visual.rotary_pos_emb(get_vision_position_ids(torch.tensor([[1, *grid]]), MERGE))
    turn = torch.cat([angles, angles], dim=-1)
    for block in visual.blocks:
        heads = block.attn.qkv(block.norm1(hidden)).view(count, num_patches, 3, block.attn.num_heads, -1)
        query, key, value = heads.unbind(2)  # (B, P, H, D)
        query, key = apply_rotary_pos_emb_vision(query, key, turn.cos(), turn.sin())
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        weights = (query @ key.transpose(2, 3) * block.attn.scaling).softmax(-1, dtype=torch.float32)
        mixed = (weights.to(value.dtype) @ value).transpose(1, 2).reshape(count, num_patches, -1)
        hidden = hidden + block.attn.proj(mixed)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.reshape(count * num_patches, -1)).view(count, num_patches // MERGE**2, -1)


def positions(ids: Sequence[int], image_token: int, grid: tuple[int, int]) -> Tensor:
    """M-RoPE's three positions of every token: (3, T) int64. Pictures have a grid of positions, text a line."""
    down, across = grid[0] // MERGE, grid[1] // MERGE
    columns: list[tuple[int, int, int]] = []
    place = 0
    while len(columns) < len(ids):
        if ids[len(columns)] != image_token:
            columns.append((place, place, place))
            place += 1
            continue
        columns += [(place, place + row, place + column) for row in range(down) for column in range(across)]
        place += max(down, across)
    return torch.tensor(columns).T


def answer_logits(
    model: Qwen2VLForConditionalGeneration, rows: Sequence[Row], pictures: Pictures
) -> tuple[Tensor, Tensor]:
    """The model's logits at every position of the answers, and the right tokens.

    Returns:
        logits (A, V) and tokens (A,) int64, for the A tokens of all answers in order.
    """
    image_token = model.config.image_token_id
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), int(model.config.get_text_config().pad_token_id))
    places = torch.zeros(3, len(rows), length, dtype=torch.int64)
    wanted = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        places[:, number, : len(row.ids)] = positions(row.ids, image_token, pictures.grid)
        wanted[number, row.begin : len(row.ids)] = True
    embedded = model.get_input_embeddings()(ids)
    seen = [row.image for row in rows if row.image is not None]
    if seen:
        visual = encode_pictures(model.model.visual, pictures.inputs(seen), pictures.grid).flatten(0, 1)
        embedded = embedded.masked_scatter((ids == image_token)[:, :, None], visual.to(embedded.dtype))
    # Padding is at the end, so that in a causal model no other token sees it.
    hidden = model.model.language_model(inputs_embeds=embedded, position_ids=places, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][wanted[:, 1:]]), ids[:, 1:][wanted[:, 1:]]
