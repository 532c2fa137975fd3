"""The ranker's prompts, checked before tuning and scoring: the longest one fits, and the engine sees the tuned one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.image_frames import ImageFrame
from notellm2_ray.models.prompt_room import COMPARED, LongPrompt, check_prompt, white_image
from notellm2_ray.models.ranker.inputs import Question, RankerPreprocessor, RankerPrompter


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


def probes(max_pixels: int) -> list[Question]:
    """Questions with images of several shapes, to ask an engine once when it starts."""
    questions = []
    for aspect in COMPARED:
        file = io.BytesIO()
        white_image(max_pixels, aspect).save(file, "PNG")
        questions.append(Question("a note", file.getvalue(), "the sea"))
    return questions


def compare_prompts(
    prompter: RankerPrompter, processor: Any, name: str, asked: Sequence[Question], seen: Sequence[Sequence[int]]
) -> None:
    """Compare the ids that an engine made of some questions with those that the model is tuned on.

    Args:
        processor: of the model; its tokenizer must be another object than the prompter's.
        name: of the model, for the message.
        seen: by the engine, for each question.

    Raises:
        ModelError: they differ.
    """
    preprocessor = RankerPreprocessor(prompter, processor)
    for question, ids in zip(asked, seen, strict=True):
        own = preprocessor.features(question).input_ids.tolist()
        if list(ids) != own:
            raise ModelError(
                f"{name}: vLLM makes {len(ids)} tokens of a prompt with an image, and transformers, with which the "
                f"model is tuned, {len(own)} or other ones, so that scores would mean nothing. Choose another model"
            )
