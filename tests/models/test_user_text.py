"""Users' texts inside of a prompt: no space before them that nobody wrote, and no marks."""

from __future__ import annotations

import pytest

from notellm2_ray.models.user_text import UserTextEncoder
from tests.support import tiny_models, tiny_tokenizers

TEXTS = ["red cat", " red cat", "", "\n", "\n\nred", "猫", "the <image> here", "</s>cat"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_inside_a_prompt_gets_no_leading_space(text):
    llama = tiny_tokenizers.llama(["<image>"])
    encoder = UserTextEncoder(llama, inside=True)
    (ids,) = encoder.encode([text])
    assert encoder.forbidden.isdisjoint(ids)
    before = llama("note: {", add_special_tokens=False).input_ids
    assert llama.decode([*before, *ids], skip_special_tokens=True) == "note: {" + text


def test_alone_a_text_is_encoded_as_the_tokenizer_does_it():
    llama = tiny_tokenizers.llama(["<image>"])
    assert UserTextEncoder(llama).encode(["red cat"]) == [llama("red cat", add_special_tokens=False).input_ids]


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_that_adds_no_space_is_left_alone(text):
    words = tiny_models.tokenizer()
    assert UserTextEncoder(words, inside=True).encode([text]) == UserTextEncoder(words).encode([text])
