"""What an image becomes in a prompt: the ids that the model's own processor makes of its placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from notellm2_ray.core.recommend_prompts import ImageSlot, Part


class ImageFrame(NamedTuple):
    """One image's tokens, and what the processor writes around them."""

    ids: Sequence[int]  # from the first special token to the last: the image's tokens, and marks around them
    before: str = ""  # plain words before these, which may merge with the prompt's own (Gemma: two line breaks)
    after: str = ""


def put_images(ids: Sequence[int], images: Sequence[Sequence[int]], placeholder_id: int) -> list[int]:
    """Token ids with the i-th placeholder replaced by the ids of the i-th image.

    Raises:
        ValueError: there are more or fewer placeholders than images.
    """
    places = [place for place, i in enumerate(ids) if i == placeholder_id]
    if len(places) != len(images):
        raise ValueError(f"{len(places)} image placeholders in the prompt, {len(images)} images")
    expanded: list[int] = []
    begin = 0
    for place, image in zip(places, images, strict=True):
        expanded += [*ids[begin:place], *image]
        begin = place + 1
    return [*expanded, *ids[begin:]]


def without_breaks(parts: Sequence[Part]) -> list[Part]:
    """The parts without line breaks after an image.

    Gemma 3's frame ends in line breaks. A further one would merge with them, and vLLM 0.29 would not find the image.
    """
    follows = [False, *(isinstance(part, ImageSlot) for part in parts)]
    pairs = zip(parts, follows, strict=False)
    return [part.lstrip("\n") if after and isinstance(part, str) else part for part, after in pairs]
