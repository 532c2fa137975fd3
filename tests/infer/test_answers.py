"""Answers that repeat themselves or think aloud, and what a preference's next prompt gets of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from notellm2_ray.core.recommend_prompts import Item
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.core.thoughts import without_thought
from notellm2_ray.infer.answers import is_repetitive, unescaped, without_loop

CALM = "The user likes cats, e.g. black ones, and e.g. lazy ones. Dogs are another taste. Nothing here comes again."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (CALM, CALM),
        ("", ""),
        (
            "He likes cats a lot. He likes dogs. He likes cats a lot. He likes cats a lot.",
            "He likes cats a lot. He likes dogs.",
        ),
        ("The user likes " + "cats and dogs, " * 20 + "cats and d", "The user likes cats and dogs"),
        ("A fine taste in cats. " * 30 + "A fine", "A fine taste in cats."),
        ("该用户偏好猫咪视频。" * 20, "该用户偏好猫咪视频。"),
    ],
)
def test_what_a_model_repeats_is_kept_once(text, kept):
    assert without_loop(text) == kept
    assert without_loop(kept) == kept


def test_a_text_that_repeats_itself_with_small_changes_is_shortened():
    text = " ".join(f"The user appears to like funny videos of kind {i}." for i in range(40))
    shortened = without_loop(text)
    assert text.startswith(shortened) and shortened.endswith(".") and not is_repetitive(shortened)


def test_quotation_marks_that_a_model_copies_from_the_prompt_are_not_escaped_again():
    assert unescaped(r"likes \"cats\" and \\\"dogs\\\", not C:\x") == r'likes "cats" and "dogs", not C:\x'


def test_a_thought_is_no_part_of_an_answer():
    assert without_thought("<think>\nHm. Yes?\n</think>\n\nNo") == "\n\nNo"
    assert without_thought("so it is\n</think>\nYes") == "\nYes"  # the prompt opened it
    assert without_thought("<think>\nHm. Ye") == ""
    assert without_thought("I think so") == "I think so"


def test_a_loop_is_not_shown_to_the_next_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from notellm2_ray.infer.preference_steps import PreferenceWriter
    from notellm2_ray.models.chat import ChatTokenizer
    from tests.support.tiny_mllm import save_mllm

    chat = ChatTokenizer.from_pretrained(save_mllm(tmp_path))
    writer = PreferenceWriter(None, chat, PreferenceSettings(), GenerationSettings(), "en", 0)
    said = iter(["The user likes cats. " * 30 + "The user", CALM])

    async def answer(ids: list[int], seed: int, attempt: int) -> SimpleNamespace:
        return SimpleNamespace(token_ids=chat.encode(next(said)), finish_reason="length")

    monkeypatch.setattr(writer, "_generate", answer)
    looped = asyncio.run(writer.advance(None, [Item("a cat")], user="u", block=0))
    assert (looped.preference, looped.looped, looped.cut, looped.calls) == ("The user likes cats.", True, True, 1)
    calm = asyncio.run(writer.advance(looped.preference, [Item("a dog")], user="u", block=1))
    assert (calm.preference, calm.looped) == (CALM, False)
