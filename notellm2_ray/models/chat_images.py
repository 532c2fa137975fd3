"""Images in prompts: the ids that a model's own processor makes of them, and a check that ours are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.recommend_prompts import IMAGE, Part
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.image_frames import ImageFrame
from notellm2_ray.models.user_text import leading_ids

if TYPE_CHECKING:
    from PIL.Image import Image

# What a processor returns for the language model; the rest is for the vision tower.
_TEXT_INPUTS = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
# Prompts in which the image comes first and in the middle, with line breaks, which Gemma's tokenizer merges.
_PROBES: tuple[tuple[Part, ...], ...] = (
    (IMAGE, "\nThe cover. Yes or No:"),
    ("Look at this.\nThe cover: ", IMAGE, "\nYes or No:"),
)


def process_image(chat: ChatTokenizer, processor: Any, image: Image) -> tuple[ImageFrame, dict[str, torch.Tensor]]:
    """An image's frame in a prompt and its inputs for the vision tower, both from the model's own processor.

    Raises:
        ModelError: the processor makes no token of an image.
    """
    made = processor(text=[chat.template.placeholder], images=[image], return_tensors="pt")
    ids = [int(i) for i in made["input_ids"][0]]
    if chat.image_token_id not in ids:
        raise ModelError("the processor makes no token of an image: it is not the processor of this model")
    first = leading_ids(chat.tokenizer)
    ids = ids[len(first) :] if first and ids[: len(first)] == first else ids
    vision = {name: tensor for name, tensor in made.items() if name not in _TEXT_INPUTS}
    return _frame(chat, ids), vision


def _frame(chat: ChatTokenizer, ids: list[int]) -> ImageFrame:
    special = [place for place, i in enumerate(ids) if i in chat.special_ids]
    begin, end = min(special), max(special) + 1
    before, after = (str(chat.tokenizer.decode(part)) for part in (ids[:begin], ids[end:]))
    return ImageFrame(ids[begin:end], before, after)


def check_images(chat: ChatTokenizer, processor: Any, images: Sequence[Image], name: str) -> None:
    """Compare our prompts with the model's own processor, which makes the ids of a whole text with its images.

    Args:
        images: of several shapes, as processors cut images into a number of tiles that depends on the shape.
        name: of the model, for the message.

    Raises:
        ModelError: they differ, so that the model would be asked in another way than it was trained.
    """
    first = leading_ids(chat.tokenizer)
    for image in images:
        frame, _ = process_image(chat, processor, image)
        for parts in _PROBES:
            ours = chat.prompt(parts, frames=[frame])
            made = processor(text=[chat.text(parts)], images=[image], add_special_tokens=False, return_tensors="pt")
            theirs = [int(i) for i in made["input_ids"][0]]
            if ours not in (theirs, [*first, *theirs]):
                raise ModelError(
                    f"{name}: for an image of {image.width} x {image.height} pixels its processor writes other tokens "
                    f"({len(theirs)} in a test prompt) than our prompt has ({len(ours)}). Such a model cannot be asked "
                    "about images here; choose another one (LLaVA, Qwen-VL, InternVL, Gemma 3, Idefics3, Pixtral)"
                )
