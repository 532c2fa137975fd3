"""The ranker's longest prompt, checked before tuning and before scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from notellm2_ray.models.image_frames import ImageFrame
from notellm2_ray.models.prompt_room import LongPrompt, check_prompt
from notellm2_ray.models.ranker.inputs import Question, RankerPrompter


def check_ranker(prompter: RankerPrompter, processor: Any, name: str, max_model_len: int) -> int:
    """The tokens of the longest prompt: an image of any shape, and texts that use up their budgets.

    Args:
        name: of the model, for messages.
        max_model_len: of the engines that score, for a prompt and one token of its answer.

    Raises:
        ConfigError: it does not fit.
        ModelError: the model's own processor makes other tokens of an image than our prompt has.
    """
    settings = prompter.settings
    shows_image = settings.variant != "tallrec"
    # Budgets are counted in tokens, and every word has at least one.
    title, preference = ("taste " * tokens for tokens in (settings.max_title_tokens, settings.max_preference_tokens))
    question = Question(title, b"" if shows_image else None, preference, (title,) * settings.max_history)

    def ids(frames: Sequence[ImageFrame]) -> list[int]:
        return prompter.prompt(question, frames)

    knobs = ["ranker.max_title_tokens", "ranker.max_preference_tokens" if shows_image else "ranker.max_history"]
    knobs += ["ranker.max_image_pixels"] if shows_image else []
    remedy = f"Raise generation.max_model_len={max_model_len}, or lower {', '.join(knobs[:-1])} or {knobs[-1]}"
    room = max_model_len - 1 - len(prompter.chat.answers.common)
    pixels = settings.max_image_pixels if shows_image else None
    return check_prompt(prompter.chat, processor, name, LongPrompt(ids, room, pixels, remedy))
