"""Checks of a job's prompts before any work: images become the tokens that the model expects, and the longest one fits.

Some processors cut an image into tiles, so that its tokens depend on its shape: up to 2,928 for LLaVA-NeXT, 3,328 for
InternVL. Without this check a job would find out after hours, prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.chat_images import check_images, process_image
from notellm2_ray.models.image_frames import ImageFrame

if TYPE_CHECKING:
    from PIL.Image import Image

_ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 2.0, 3.0, 6.0)  # tried lying and standing
COMPARED = (1.0, 2.0, 1 / 2)  # shapes whose tokens are compared with the processor's


class LongPrompt(NamedTuple):
    """A prompt of a job at its longest."""

    ids: Callable[[Sequence[ImageFrame]], list[int]]  # its token ids, given the frames of its images
    room: int  # the most tokens that it may have
    max_pixels: int | None  # of its image; None: it shows none
    remedy: str  # what to change if it has more


def check_prompt(chat: ChatTokenizer, processor: Any, name: str, prompt: LongPrompt) -> int:
    """The number of tokens of the longest prompt.

    Args:
        processor: of the model, as from :func:`~notellm2_ray.models.processors.load_processor`.
        name: of the model, for messages.

    Raises:
        ConfigError: it does not fit.
        ModelError: the model's own processor makes other tokens of an image than our prompt has.
    """
    longest, cause = len(prompt.ids([])) if prompt.max_pixels is None else 0, ""
    if prompt.max_pixels is not None:
        check_images(chat, processor, [white_image(prompt.max_pixels, aspect) for aspect in COMPARED], name)
        for image in _images(prompt.max_pixels):
            frame, _ = process_image(chat, processor, image)
            tokens = len(prompt.ids([frame]))
            if tokens > longest:
                longest, cause = tokens, f", {len(frame.ids):,} of them for an image of {image.width} x {image.height}"
    if longest > prompt.room:
        raise ConfigError(f"{name}: a prompt can have {longest:,} tokens{cause}; {prompt.room:,} fit. {prompt.remedy}")
    return longest


def _images(max_pixels: int) -> Iterator[Image]:
    """White images of several shapes, each as large as images get."""
    for aspect in _ASPECTS:
        yield white_image(max_pixels, aspect)
        if aspect != 1:
            yield white_image(max_pixels, 1 / aspect)


def white_image(max_pixels: int, aspect: float) -> Image:
    """A white image of ``max_pixels``, ``aspect`` times as wide as high."""
    from PIL import Image

    from notellm2_ray.core.images import MIN_SIDE

    sides = math.sqrt(max_pixels * aspect), math.sqrt(max_pixels / aspect)
    return Image.new("RGB", (max(MIN_SIDE, int(sides[0])), max(MIN_SIDE, int(sides[1]))), "white")
