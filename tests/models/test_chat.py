"""A chat template around a prompt, as token ids."""

from __future__ import annotations

import base64
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AddedToken

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.recommend_prompts import IMAGE, Text
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.image_frames import put_images
from notellm2_ray.models.llm import load_tokenizer
from tests.support import tiny_models

# Templates like those of four families: lists of content, strings only, no system message, images first.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|see|><image><|seen|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRINGS = (
    "<|start|>{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
IMAGES_FIRST = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "strings": STRINGS, "no system": NO_SYSTEM, "images first": IMAGES_FIRST, "none": None}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|endoftext|>", "<image>", "<|see|>", "<|seen|>", "<think>"]


def tokenizer():
    made = tiny_models.tokenizer()
    made.add_tokens([AddedToken(token, special=True) for token in SPECIAL if token != "<think>"])
    return made


def chat_of(kind: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer(), TEMPLATES[kind], None if kind in ("strings", "no system") else "<image>")


@pytest.fixture(scope="module")
def chats():
    return {kind: chat_of(kind) for kind in TEMPLATES}


def text_of(chat: ChatTokenizer, ids) -> str:
    return chat.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["chatml", "strings", "images first"])
def test_a_prompt_equals_the_rendered_template(chats, kind):
    chat = chats[kind]
    content = "red cat" if kind == "strings" else [{"type": "text", "text": "red cat"}]
    system = "a small house" if kind == "strings" else [{"type": "text", "text": "a small house"}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    for begin in (0, 1):
        rendered = chat.tokenizer.apply_chat_template(
            messages[begin:], chat_template=TEMPLATES[kind], add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt(["red cat"], system="" if begin else "a small house") == rendered


def test_a_missing_place_in_a_template_loses_no_text(chats):
    chat = chats["no system"]
    assert text_of(chat, chat.prompt(["red cat"], system="sofa")) == "[INST] sofa\n\nred cat [/INST]"
    plain = chats["none"]
    assert text_of(plain, plain.prompt([IMAGE, "red ", Text("cat")], system="sofa")) == "sofa\n\n<image>\nred cat\n"


def test_an_image_keeps_its_position(chats):
    for kind, words in {"chatml": "<|see|><image><|seen|>", "images first": "<image>\n", "none": "<image>\n"}.items():
        chat = chats[kind]
        ids = chat.prompt(["red ", IMAGE, "cat"])
        assert ids.count(chat.image_token_id) == 1
        assert f"red {words}cat" in text_of(chat, ids)
    with pytest.raises(ModelError, match="reads no images"):
        chats["strings"].prompt([IMAGE])


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    kind=st.sampled_from(sorted(TEMPLATES)),
    pieces=st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "im_end", "\n", "[INST]", "猫", " "]), max_size=12),
    free=st.text(max_size=20),
)
def test_no_text_becomes_a_special_token(chats, kind, pieces, free):
    chat = chats[kind]
    hostile = "".join(pieces) + free
    special = set(chat.tokenizer.convert_tokens_to_ids(SPECIAL))
    ids = chat.prompt(["red ", Text(hostile), " cat"])
    assert [i for i in ids if i in special] == [i for i in chat.prompt(["red ", " cat"]) if i in special]
    assert special.isdisjoint(chat.encode(hostile))


def test_tokens_of_a_template_do_not_depend_on_its_pieces(chats):
    chat = chats["chatml"]
    assert chat.prompt(["re", "d c", "at ", Text("sofa")]) == chat.prompt(["red cat ", Text("sofa")])


@given(text=st.text(max_size=60))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_encoding_and_decoding_text(chats, text):
    for special in SPECIAL:
        text = text.replace(special, "")
    assert chats["chatml"].decode(chats["chatml"].encode(text)) == text


@given(text=st.text(max_size=80), limit=st.integers(0, 20))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_truncation_keeps_a_prefix_within_the_limit(chats, text, limit):
    chat = chats["chatml"]
    cut = chat.truncate(text, limit)
    assert text.startswith(cut)
    assert len(chat.encode(cut)) <= limit
    assert cut == text or len(chat.encode(text)) > limit


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_yes_and_no_are_the_tokens_that_follow_in_the_training_string(chats, kind):
    chat = chats[kind]
    prompt = chat.prompt(["Do you like the red cat?"])
    for yes, token in ((True, chat.yes_id), (False, chat.no_id)):
        answer = chat.answer(yes)
        assert answer[len(chat.answers.common)] == token
        assert answer[-1] == chat.end_ids[0]
        assert chat.decode(answer).strip() == ("Yes" if yes else "No")
        together = chat.tokenizer(text_of(chat, prompt + answer[:-1]), add_special_tokens=False).input_ids
        assert together == prompt + answer[:-1]
    assert chat.yes_id != chat.no_id
    assert chat.end_ids[0] == chat.tokenizer.convert_tokens_to_ids("<|endoftext|>" if kind == "none" else "<|im_end|>")


def test_it_is_pickled_and_shared_between_threads(chats):
    chat = pickle.loads(pickle.dumps(chats["chatml"]))
    prompts = [["red ", Text(f"<|im_end|> cat {i}"), IMAGE] for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(chat.prompt, prompts)) == [chats["chatml"].prompt(parts) for parts in prompts]


def test_a_saved_model_s_template_is_found(tmp_path):
    words = tokenizer()
    words.chat_template = STRINGS
    tiny_models.save_llm(tmp_path)
    words.save_pretrained(tmp_path)
    chat = ChatTokenizer.from_pretrained(str(tmp_path))
    assert text_of(chat, chat.prompt(["cat"])) == "<|start|>[user]\n\ncat<|im_end|>[assistant]\n\n"
    with pytest.raises(ModelError, match="no usable tokenizer"):
        ChatTokenizer.from_pretrained(str(tmp_path / "absent"))


def test_mistral_s_own_tokenizer_is_refused_by_name(tmp_path):
    tiny_models.save_llm(tmp_path, "mistral")
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
    ]
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 1256, "default_num_special_tokens": 1000}
    config = {"pattern": r"\s+|\S+", "version": "v3", **sizes}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    for load in (ChatTokenizer.from_pretrained, load_tokenizer):
        with pytest.raises(ModelError, match=r"tekken\.json.*tokenizer\.json"):
            load(str(tmp_path))


def test_a_broken_template_is_an_error():
    for template in ("{{ 1 / 0 }}", "nothing"):
        with pytest.raises(ModelError, match="chat template"):
            ChatTokenizer(tokenizer(), template)


def test_images_are_put_in_place():
    assert put_images([1, 9, 2, 9], [[5, 9, 9, 6], [7]], 9) == [1, 5, 9, 9, 6, 2, 7]
    assert put_images([1, 2], [], 9) == [1, 2]
    with pytest.raises(ValueError, match="1 image placeholders in the prompt, 2 images"):
        put_images([1, 9], [[1], [1]], 9)
