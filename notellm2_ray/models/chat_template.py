"""The words that a model's chat template puts around a prompt, read off the rendered template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.core.thoughts import closed_thought

_SYSTEM, _USER = "0SYSTEM0WORDS0", "0USER0WORDS0"  # stand-ins that no template alters
# Errors of a template that does not support the given messages: its own refusal, or any Python error.
_RENDERING = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class TemplateWords(NamedTuple):
    """The words that a template puts around a prompt and its answer."""

    before: str  # before the user's turn, if there is no system message
    before_system: str | None  # before the system message; None: the template takes no system message
    after_system: str  # between the system message and the user's turn
    after: str  # after the user's turn, up to the answer; a thought that the template begins with is closed, empty
    image: str  # stands for one image; empty: the model takes no images
    placeholder: str  # the token in these words that the model's processor replaces; empty: the model takes no images
    answer_space: str  # white space before the answer in a finished conversation
    answer_end: str  # after the answer


def image_tokens(processor: Any) -> list[str]:
    """The tokens that may stand for an image in a chat template: the one that an image becomes, or Gemma 3's mark."""
    found = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    return [str(token) for token in found if token is not None]


def read_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, image_tokens: Sequence[str] = ()
) -> TemplateWords:
    """A template's words, cut out of a rendering of stand-ins for the system message, the user's text and the answer.

    Args:
        template: None for a model without one, which gets a plain layout.
        image_tokens: tokens that may stand for an image, the likeliest first; none for a text-only model.

    Raises:
        ModelError: the template cannot be rendered.
    """
    if template is None:
        image, placeholder = (f"{image_tokens[0]}\n", image_tokens[0]) if image_tokens else ("", "")
        return TemplateWords("", "", "\n\n", "\n", image, placeholder, "", "")

    def render(content: Any, system: str | None = None, answer: str | None = None) -> str:
        return _render(tokenizer, template, content, system, answer)

    content: Any = [{"type": "text", "text": _USER}]
    try:
        around = _cut(render(content), _USER)
        if around is None or "'type'" in around[0] or '"type"' in around[0]:
            raise ValueError("it does not take lists")
    except Exception:  # templates can raise any error; those of text models may take strings only
        content = _USER
        around = _cut_or_fail(lambda: render(content))
    before, after = around
    image, placeholder = _image_words(render, before, image_tokens)
    before_system, after_system = _system_words(render, content)
    lead, space, end = _answer_words(render, content, before + _USER + after)
    after = closed_thought(after + lead)
    return TemplateWords(before, before_system, after_system, after, image, placeholder, space, end)


def _render(tokenizer: Any, template: str, content: Any, system: str | None, answer: str | None) -> str:
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    in_lists = isinstance(content, list)
    if system is not None:
        text = [{"type": "text", "text": system}] if in_lists else system
        messages.insert(0, {"role": "system", "content": text})
    if answer is not None:
        text = [{"type": "text", "text": answer}] if in_lists else answer
        messages.append({"role": "assistant", "content": text})
    # Without a fixed date the prompts would change every day. Models that can write out reasoning are told not to.
    fixed = {"date_string": "26 Jul 2024", "enable_thinking": False}
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=answer is None, **fixed
    )


def _cut(text: str, stand_in: str) -> tuple[str, str] | None:
    pieces = text.split(stand_in)
    return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _cut_or_fail(render: Any) -> tuple[str, str]:
    try:
        around = _cut(render(), _USER)
    except _RENDERING as error:
        raise ModelError(f"the model's chat template cannot be rendered: {first_line(error)}") from error
    if around is None:
        raise ModelError("the model's chat template must contain the user's text exactly once, but does not")
    return around


def _image_words(render: Any, before: str, image_tokens: Sequence[str]) -> tuple[str, str]:
    """The words that stand for an image, and the placeholder in them.

    The image is rendered before the text, as some templates put all images first.
    """
    if not image_tokens:
        return "", ""
    try:
        around = _cut(render([{"type": "image"}, {"type": "text", "text": _USER}]), _USER)
    except _RENDERING:
        around = None
    for begin in (before, before.rstrip()):  # Idefics3 puts a space after "User:", but not if an image follows
        if around is not None and around[0].startswith(begin):
            words = around[0].removeprefix(begin)
            for token in image_tokens:
                if words.count(token) == 1:
                    return words, token
    return f"{image_tokens[0]}\n", image_tokens[0]


def _system_words(render: Any, content: Any) -> tuple[str | None, str]:
    try:
        around = _cut(render(content, _SYSTEM), _SYSTEM)
    except _RENDERING:  # the templates of Mistral and Gemma refuse a system message
        return None, ""
    between = None if around is None else _cut(around[1], _USER)
    return (None, "") if around is None or between is None else (around[0], between[0])


def _answer_words(render: Any, content: Any, prompt: str) -> tuple[str, str, str]:
    """The words that begin an answer in a finished conversation, the white space before it, and the words after it.

    Words that begin an answer close an empty thought or name the channel that answers go to; a template that asks for a
    thought leaves them out of its prompt.
    """
    try:
        around = _cut(render(content, None, _SYSTEM), _SYSTEM)
    except _RENDERING:
        around = None
    if around is None:
        return "", "", ""
    between = around[0][len(prompt) :] if around[0].startswith(prompt) else ""
    return (between, "", around[1]) if between.strip() else ("", between, around[1])
