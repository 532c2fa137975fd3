"""Loading the tokenizer or processor of a chat model."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.models.llm import refuse_mistral_common
from notellm2_ray.models.quiet import quiet_loading


@quiet_loading()
def load_processor(path: str, revision: str | None = None) -> Any:
    """The processor of an image-text model, or the tokenizer of a text-only one.

    Raises:
        ModelError: there is neither.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{path} has no usable tokenizer or processor: {first_line(error)}. Give the "
            "directory or hub name of a Hugging Face model with its tokenizer, and its processor if it reads images"
        ) from error
    for tokenizer in (processor, getattr(processor, "tokenizer", None)):
        refuse_mistral_common(tokenizer, path)
    return processor
