"""A multimodal LLM's images, as its own processor makes them: tokens in the prompt, and inputs of the image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from notellm2_ray.core.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageTokens(NamedTuple):
    """What a processor makes of one image."""

    ids: list[int]  # (S,) its tokens in the prompt, with the marks around them
    types: dict[str, list[int]]  # token types (S,), by the name of the network's input
    vision: dict[str, torch.Tensor]  # inputs of the image encoder, (1 or more, ...) each


class ImageTokenizer:
    """Turns images into tokens by a model's own processor. Picklable; not safe in several threads.

    Attributes:
        words: those that stand for an image.
        image_id: the token that an image becomes.
    """

    def __init__(self, processor: Any, words: str) -> None:
        """Find words for which the processor makes tokens.

        Args:
            processor: of the model.
            words: what stands for an image in the model's chat template.

        Raises:
            ModelError: the processor makes no tokens of an image.
        """
        self.processor = processor
        token = getattr(processor, "image_token", None)
        self.image_id: Any = None if token is None else processor.tokenizer.convert_tokens_to_ids(str(token))
        # BLIP-2's processor puts an image's tokens before any text. Others look for words that stand for the image:
        # those of the chat template, or a mark of their own (Gemma's is not the token that it then repeats).
        for self.words in ("", words, str(token), str(getattr(processor, "boi_token", token))):
            try:
                self(blank_image())
                return
            except Exception as error:  # processors raise all kinds of errors for words that they do not expect
                reason = str(error).strip() or type(error).__name__
        raise ModelError(f"{type(processor).__name__} makes no tokens of an image: {reason}")

    def __call__(self, image: Image) -> ImageTokens:
        """The tokens of an image.

        Raises:
            DataError: there are none.
        """
        made = self.processor(text=[self.words], images=[image], return_tensors="pt", add_special_tokens=False)
        ids = made.pop("input_ids")
        made.pop("attention_mask", None)
        if not (ids == self.image_id).any():
            raise DataError("the processor makes no token of an image: it is not the processor of this model")
        types = {name: made.pop(name)[0].tolist() for name in list(made) if name.endswith("token_type_ids")}
        return ImageTokens(ids[0].tolist(), types, dict(made))


def blank_image(side: int = 56) -> Image:
    """A white square."""
    from PIL import Image

    return Image.new("RGB", (side, side), "white")


def joined_images(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The images of a batch, concatenated, and padded with zeros if their sizes differ."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    padded = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        # torch takes the last axis first, as (before, after).
        amounts = [amount for gap in reversed(missing) for amount in (0, gap)]
        padded.append(F.pad(part, amounts) if any(missing) else part)
    return torch.cat(padded)
