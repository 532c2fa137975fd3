"""What an image becomes in a prompt: the ids that the model's own processor makes of its placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
