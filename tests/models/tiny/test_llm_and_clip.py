"""Tiny models: they learn, are the same every time, and load like real checkpoints."""

from __future__ import annotations

import io
import math
import random
import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    Qwen2Tokenizer,
)

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.tiny.clip import _distinct_groups, clip_loss, train_tiny_clip
from notellm2_ray.models.tiny.exercises import Question
from notellm2_ray.models.tiny.llm import train_tiny_llm, train_tokenizer

SMALL = TinySettings(
    vocab_size=400,
    llm_layers=1,
    llm_hidden_size=32,
    llm_heads=2,
    llm_steps=20,
    llm_batch_size=4,
    vision_layers=1,
    vision_hidden_size=32,
    vision_heads=2,
    image_size=16,
    patch_size=8,
    clip_steps=60,
    clip_batch_size=16,
)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 30),
    "purple": (150, 30, 180),
    "cyan": (30, 220, 220),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}


def _texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"the {draw.choice(list(COLOURS))} note likes tea" for _ in range(5)) for _ in range(60)]


def _questions(texts: list[str]) -> list[Question]:
    return [Question(text, "") for text in texts]


def _captioned(count: int = 200) -> list[tuple[bytes, str]]:
    draw = random.Random(1)
    found = []
    for _ in range(count):
        name = draw.choice(list(COLOURS))
        colour = tuple(max(0, min(255, value + draw.randint(-10, 10))) for value in COLOURS[name])
        file = io.BytesIO()
        Image.new("RGB", (24, 20), colour).save(file, "PNG")
        found.append((file.getvalue(), f"a {name} square"))
    return found


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "llm"
    return directory, train_tiny_llm(_questions(_texts()), SMALL, directory, seed=7)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, llm):
    directory = tmp_path_factory.mktemp("tiny") / "clip"
    return directory, train_tiny_clip(_captioned(), SMALL, directory, 7, llm[0])


@pytest.fixture(scope="module")
def tokenizer(llm) -> Qwen2Tokenizer:
    return AutoTokenizer.from_pretrained(llm[0])


def test_llm_learns_and_what_is_saved_is_what_was_trained(llm):
    directory, figures = llm
    nothing = math.log(figures["vocab"])  # of prompts and answers each, before training
    assert figures["first_loss"] == pytest.approx(2 * nothing, rel=0.1)
    assert figures["last_loss"] < 0.7 * figures["first_loss"]
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    assert model.num_parameters() == figures["parameters"]
    assert model.config.tie_word_embeddings
    assert len(tokenizer) == figures["vocab"] == model.config.vocab_size
    tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(_texts()[0])["input_ids"]])[None]
    with torch.inference_mode():
        assert model(input_ids=tokens, labels=tokens).loss < 0.8 * nothing


def test_one_seed_gives_one_model_on_any_number_of_threads_and_keeps_the_global_state(llm, clip, tmp_path):
    torch.manual_seed(99)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train_tiny_llm(iter(_questions(_texts())), SMALL, tmp_path / "llm", seed=7)
        train_tiny_clip(iter(_captioned()), SMALL, tmp_path / "clip", 7, tmp_path / "llm")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.random.get_rng_state())
    for directory, again in ((llm[0], tmp_path / "llm"), (clip[0], tmp_path / "clip")):
        first, second = (load_file(place / "model.safetensors") for place in (directory, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert (directory / "tokenizer.json").read_text() == (again / "tokenizer.json").read_text()
    train_tiny_llm(_questions(_texts()), SMALL.model_copy(update={"llm_steps": 1}), tmp_path / "other", seed=8)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(
        load_file(tmp_path / "other" / "model.safetensors")[embedding],
        load_file(llm[0] / "model.safetensors")[embedding],
    )


@settings(max_examples=150, deadline=None)
@given(text=st.text())
@example(text="ﬁ 豈 Ω e\u0301 👩‍👩‍👧 \x00\r\n  ")
def test_every_text_comes_back_from_its_tokens(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(tokens) == unicodedata.normalize("NFC", text)  # as every Qwen2 tokenizer does
    assert not set(tokens) & set(tokenizer.all_special_ids)


def test_the_tokenizer_that_loads_is_the_one_that_was_trained(llm, clip):
    trained = train_tokenizer(_texts(), SMALL.vocab_size)
    texts = [*_texts()[:5], "Zero 0123456789, it's  odd:\n\n茶道 <|end|>"]
    for directory in (llm[0], clip[0]):
        loaded = AutoTokenizer.from_pretrained(directory)
        assert len(loaded) == len(trained) == llm[1]["vocab"]
        assert loaded(texts)["input_ids"] == trained(texts)["input_ids"]


def test_special_tokens_are_three_and_a_users_text_cannot_become_one(tokenizer):
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    assert len(set(special)) == 3 and None not in special
    text = f"a note that says {tokenizer.eos_token} and {tokenizer.pad_token}{tokenizer.bos_token}"
    tokens = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert not set(tokens) & set(special)
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text_is_an_error_that_says_what_to_do(texts, tmp_path):
    with pytest.raises(DataError, match=r"no text .* set model\.llm"):
        train_tiny_llm(_questions(texts), SMALL, tmp_path, seed=0)


def test_a_corpus_of_one_word_is_enough(tmp_path):
    figures = train_tiny_llm(_questions(["茶"]), SMALL.model_copy(update={"llm_steps": 2}), tmp_path, seed=0)
    assert figures["last_loss"] < figures["first_loss"]


def test_progress_is_logged_with_loss_and_time_left(tmp_path, caplog):
    with caplog.at_level("INFO", logger="notellm2_ray"):
        train_tiny_llm(_questions(["tea"]), SMALL.model_copy(update={"llm_steps": 2}), tmp_path, seed=0)
    assert any("2 / 2 steps" in line and "loss" in line and "s left" in line for line in caplog.messages)


def test_clip_learns_to_tell_held_out_images_apart(clip):
    _, figures = clip
    assert figures["last_loss"] < 0.5 * figures["first_loss"]
    assert figures["images"] == 200
    assert figures["accuracy"] > 3 / figures["candidates"]  # a guess is right once in as many


def test_clip_loads_as_a_real_clip_does(clip):
    directory, _ = clip
    config = AutoConfig.from_pretrained(directory)
    assert (config.model_type, config.vision_config.image_size, config.vision_config.patch_size) == ("clip", 16, 8)
    tower, report = CLIPVisionModel.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    processor = CLIPImageProcessor.from_pretrained(directory)
    assert processor.image_mean == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    pixels = processor(Image.new("RGB", (40, 30)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert tower(pixel_values=pixels).last_hidden_state.shape == (1, 5, 32)


def test_the_text_tower_pools_at_the_end_of_the_caption(clip):
    directory, _ = clip
    tokenizer, model = AutoTokenizer.from_pretrained(directory), CLIPModel.from_pretrained(directory).eval()
    ids = tokenizer("a red square", add_special_tokens=False)["input_ids"]
    row = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
    padded = torch.nn.functional.pad(row, (0, 4), value=tokenizer.pad_token_id)
    with torch.inference_mode():
        short, long = (model.text_model(input_ids=tokens).pooler_output for tokens in (row, padded))
        end = model.text_model(input_ids=row).last_hidden_state[:, -1]
    torch.testing.assert_close(short, end)
    torch.testing.assert_close(short, long)


def test_the_embedders_own_loaders_take_both(llm, clip):
    from notellm2_ray.models.llm import load_llm, load_tokenizer
    from notellm2_ray.models.vision.load import load_tower

    assert load_llm(str(llm[0]), "sdpa").config.hidden_size == 32
    assert load_tokenizer(str(llm[0])).pad_token_id == 0
    tower = load_tower(str(clip[0]), frozen=True)
    assert tower(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).patches.shape == (2, 4, 32)


def test_clip_loss_is_the_plain_one_without_equal_captions_among_the_negatives():
    draw = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 8, generator=draw), dim=-1) for _ in range(2))
    caption, scale = torch.tensor([0, 1, 0, 2, 1]), torch.tensor(7.0)
    total = 0.0
    for left, right in ((images, texts), (texts, images)):
        for row in range(5):
            others = [other for other in range(5) if other == row or caption[other] != caption[row]]
            logits = torch.stack([scale * left[row] @ right[other] for other in others])
            total += float(logits.logsumexp(0) - scale * left[row] @ right[row]) / 10
    assert float(clip_loss(images, texts, scale, caption)) == pytest.approx(total, rel=1e-5)


@given(captions=st.lists(st.integers(0, 4), max_size=40), size=st.integers(1, 6))
def test_groups_hold_every_row_once_and_no_caption_twice(captions, size):
    groups = _distinct_groups(captions, size)
    assert sorted(row for group in groups for row in group) == list(range(len(captions)))
    for group in groups:
        assert len(group) == len({captions[row] for row in group}) <= size


def test_clip_needs_no_tokenizer_and_reads_no_more_than_asked(tmp_path):
    small = SMALL.model_copy(update={"clip_steps": 1, "num_captions": 10})
    source = iter(_captioned(12))
    assert train_tiny_clip(source, small, tmp_path, 0)["images"] == 10
    assert len(list(source)) == 2
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1


def test_clip_names_the_image_that_cannot_be_read(tmp_path):
    broken = [*_captioned(5), (b"no image", "a broken one")]
    with pytest.raises(DataError, match=r"captioned image 5 \('a broken one'\)"):
        train_tiny_clip(broken, SMALL, tmp_path, 0)


def test_clip_refuses_too_few_images(tmp_path):
    with pytest.raises(DataError, match=r"3 images .* set model\.vision"):
        train_tiny_clip(_captioned(3), SMALL, tmp_path, 0)


def test_clip_refuses_a_tokenizer_without_the_tokens_it_needs(tmp_path):
    tokenizer = train_tokenizer(_texts(), 300)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ModelError, match="Leave out tokenizer_dir"):
        train_tiny_clip(_captioned(8), SMALL, tmp_path / "clip", 0, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llm_heads": 3}, r"tiny\.llm_hidden_size \(128\) must be an even multiple of tiny\.llm_heads \(3\)"),
        ({"image_size": 60}, r"tiny\.image_size \(60\) must be a multiple of tiny\.patch_size \(8\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TinySettings(**values)
