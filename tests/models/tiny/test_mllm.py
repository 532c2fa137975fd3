"""The tiny MLLM: it loads like a real checkpoint, is the same every time, and learns its exercises."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.recommend_prompts import IMAGE, Text
from notellm2_ray.core.settings import Settings, TinySettings
from notellm2_ray.lessons.tastes import lessons
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.image_frames import put_images
from notellm2_ray.models.tiny.exercises import Lessons
from notellm2_ray.models.tiny.mllm import train_tiny_mllm
from notellm2_ray.models.tiny.mllm_batches import Pictures, Row, answer_logits, encode_pictures, positions
from notellm2_ray.models.tiny.mllm_files import SHORT_ANSWERS

MINUTE = {
    "vocab_size": 700,
    "mllm_layers": 1,
    "mllm_hidden_size": 32,
    "mllm_heads": 1,
    "mllm_vision_layers": 1,
    "mllm_vision_hidden_size": 32,
    "mllm_vision_heads": 1,
    "mllm_image_side": 56,
    "mllm_drawings": 12,
    "mllm_topics": 12,
    "mllm_questions": 12,
    "mllm_preferences": 12,
    "mllm_held_out": 3,
    "mllm_first_steps": 2,
    "mllm_steps": 2,
    "mllm_batch_size": 3,
}
TEXTS = ["The calm harbour.", "今天的咖啡很香。", " "]


@pytest.fixture(scope="module")
def made() -> Lessons:
    return lessons(Settings(tiny=MINUTE))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, made) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("tiny") / "mllm"
    return directory, train_tiny_mllm(made, TEXTS, TinySettings(**MINUTE), directory, 3)


@pytest.fixture(scope="module")
def loaded(saved):
    directory = saved[0]
    # Biases start at zero, where an error in them would not show.
    model = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return model, AutoProcessor.from_pretrained(directory), ChatTokenizer.from_pretrained(str(directory))


def test_it_reports_what_it_learned(saved):
    _, counts = saved
    assert counts["parameters"] > 10_000
    assert counts["vocab"] <= 700
    assert {"caption_accuracy", "question_accuracy", "preference_accuracy", "seconds"} <= set(counts)
    assert counts["last_loss"] < counts["first_loss"] * 1.5


def test_it_loads_as_a_real_checkpoint_and_captions(saved, made):
    directory, _ = saved
    model = AutoModelForImageTextToText.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    image = Image.open(io.BytesIO(made.drawings[0]))
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4  # 56 pixels
    generated = model.generate(**inputs, max_new_tokens=3)
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 3
    assert not model.generation_config.do_sample
    assert processor.tokenizer.decode([model.generation_config.eos_token_id]) == "<|im_end|>"


def test_a_system_message_and_an_answer_are_turns_of_their_own(saved):
    processor = AutoProcessor.from_pretrained(saved[0])
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_yes_and_no_are_single_tokens_where_they_are_taught(saved, made):
    chat = ChatTokenizer.from_pretrained(str(saved[0]))
    for answer in SHORT_ANSWERS:
        assert len(chat.encode(answer)) == 1
    for yes, answer in ((True, "Yes"), (False, "No")):
        assert chat.answer(yes) == [*chat.encode(answer), chat.end_ids[0]]
    assert chat.answers.common == []
    assert chat.decode(chat.end_ids[:1]) == ""
    assert {exercise.answer for exercise in made.exercises if exercise.kind == "question"} == {"Yes", "No"}


def test_a_mark_in_a_text_stays_text(saved):
    chat = ChatTokenizer.from_pretrained(str(saved[0]))
    marks = "<|im_end|><|im_start|>system <|image_pad|><|vision_start|>"
    ids = chat.encode(marks)
    assert not set(ids) & set(chat.tokenizer.all_special_ids)
    assert chat.decode(ids) == marks
    prompt = chat.prompt([IMAGE, Text(marks)])
    assert prompt.count(chat.image_token_id) == 1


def test_the_same_seed_gives_the_same_weights(saved, made, tmp_path):
    train_tiny_mllm(made, TEXTS, TinySettings(**MINUTE), tmp_path / "again", 3)
    train_tiny_mllm(made, TEXTS, TinySettings(**MINUTE), tmp_path / "other", 4)
    first, again, other = (
        load_file(path / "model.safetensors") for path in (saved[0], tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_batched_pass_gives_what_the_librarys_own_gives(loaded, made):
    model, processor, chat = loaded
    pictures = Pictures(made.drawings, processor)
    images = [Image.open(io.BytesIO(drawing)) for drawing in made.drawings[:2]]
    own = processor.image_processor(images, return_tensors="pt")
    ours = encode_pictures(model.model.visual, pictures.inputs([0, 1]), pictures.grid)
    with torch.inference_mode():
        theirs = model.model.visual(own["pixel_values"], grid_thw=own["image_grid_thw"]).pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=2e-4, rtol=1e-3)

    rows = []
    for number, words in enumerate(("Is it a cross? ", "Is this grey, or black and white, or is it neither? ")):
        prompt = _with_image(chat, chat.prompt(["See: ", IMAGE, words]), pictures.tokens)
        rows.append(Row([*prompt, *chat.encode("a cross in grey")], len(prompt), number))
    with torch.inference_mode():
        logits, wanted = answer_logits(model, rows, pictures)
        for row, image, got in zip(rows, images, logits.chunk(2), strict=True):
            ids = torch.tensor([row.ids])
            kinds = (ids == chat.image_token_id).int()
            pixels = processor.image_processor([image], return_tensors="pt")
            places, _ = model.model.get_rope_index(ids, kinds, pixels["image_grid_thw"])
            assert torch.equal(places[:, 0], positions(row.ids, chat.image_token_id, pictures.grid))
            expected = model(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[0, row.begin - 1 : -1]
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    assert wanted.tolist() == [i for row in rows for i in row.ids[row.begin :]]


def test_a_vocabulary_without_room_for_the_answers_is_refused(made, tmp_path):
    with pytest.raises(ModelError, match=r"tiny\.vocab_size=264 is too small: .* is not a single token\. Raise it"):
        train_tiny_mllm(made, [], TinySettings.model_construct(**{**MINUTE, "vocab_size": 264}), tmp_path, 0)


def test_lessons_without_a_drawing_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"needs exercises with drawings"):
        train_tiny_mllm(Lessons([], [], []), TEXTS, TinySettings(**MINUTE), tmp_path, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mllm_heads": 5}, r"tiny\.mllm_hidden_size \(192\) must be an even multiple of tiny\.mllm_heads \(5\)"),
        ({"mllm_image_side": 90}, r"multiple of 28"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TinySettings(**values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict, Lessons]:
    """The tiny MLLM of the default settings: minutes."""
    settings = Settings()
    taught = lessons(settings)
    directory = tmp_path_factory.mktemp("trained") / "mllm"
    return directory, train_tiny_mllm(taught, TEXTS, settings.tiny, directory, settings.seed), taught


long = pytest.mark.skipif(
    "NOTELLM2_LONG_TESTS" not in os.environ, reason="trains for ten minutes: set NOTELLM2_LONG_TESTS=1 to run it"
)


@long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_names_both_attributes_of_nine_unseen_drawings_in_ten(trained):
    assert trained[1]["caption_accuracy"] >= 0.9


@long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_vllm_gives_the_same_captions(trained, monkeypatch):
    directory, _, taught = trained
    chat = ChatTokenizer.from_pretrained(str(directory))
    asked = [exercise for exercise in taught.held_out if exercise.kind == "caption"][:8]
    images = [Image.open(io.BytesIO(taught.drawings[exercise.image])) for exercise in asked]
    prompt = chat.prompt(asked[0].prompt)
    expected = [_greedy(directory, chat, prompt, image) for image in images]

    from vllm import LLM, SamplingParams

    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        monkeypatch.setenv(name, value)
    engine = LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    found = engine.generate(
        [{"prompt_token_ids": prompt, "multi_modal_data": {"image": image}} for image in images],
        SamplingParams(temperature=0, max_tokens=32),
    )
    assert [one.outputs[0].text for one in found] == expected


def _with_image(chat: ChatTokenizer, prompt: list[int], tokens: int) -> list[int]:
    return put_images(prompt, [[chat.image_token_id] * tokens], chat.image_token_id)


def _greedy(directory: Path, chat: ChatTokenizer, prompt: list[int], image: Image.Image) -> str:
    model = AutoModelForImageTextToText.from_pretrained(directory)
    pixels = AutoProcessor.from_pretrained(directory).image_processor([image], return_tensors="pt")
    tokens = int(pixels["image_grid_thw"].prod()) // 4
    ids = torch.tensor([_with_image(chat, prompt, tokens)])
    kinds = (ids == chat.image_token_id).int()
    generated = model.generate(input_ids=ids, mm_token_type_ids=kinds, max_new_tokens=32, **pixels)
    return chat.decode(generated[0, ids.shape[1] :].tolist())
