"""Multimodal LLMs as embedders: equal to Hugging Face's own forward pass, in any batch, and after saving."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.images import scaled_image
from notellm2_ray.core.prompts import note_prompt, shown_texts
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder
from tests.support import tiny_models
from tests.support.architectures import ARCHITECTURES, save

NOTES = [
    Note("a", "red cat", ("猫",), "sleeps on the sofa", tiny_models.picture(1, (90, 60))),
    Note("b", "a blue house by the sea", ("travel", "food"), "with a long story " * 5),
    Note("c", "", (), "", tiny_models.picture(2, (40, 130))),
]


KINDS = sorted(set(ARCHITECTURES) - {"qwen3_vl_thinking"})  # that one differs in its template alone


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a kind to the directory of such a model, made at most once.

    Its tokenizer merges nothing, so that a text has the same tokens in pieces and as a whole.
    """
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = save(kind, tmp_path_factory.mktemp(kind))
            path = Path(made[kind]) / "tokenizer.json"
            values = json.loads(path.read_text())
            values["model"]["merges"] = []
            path.write_text(json.dumps(values))
        return made[kind]

    return of


def settings(**changes) -> ModelSettings:
    defaults = {"kind": "mllm", "llm": "somewhere", "embedding_dim": None, "max_body_tokens": 400}
    return build(ModelSettings, {**defaults, **changes})


def make(path: str, **changes) -> NoteEncoder:
    return build_encoder(settings(**changes), 1, llm_path=path, vision_path="")


def own_vector(path: str, text: str, image: bytes | None) -> np.ndarray:
    """The state of the last token in Hugging Face's own forward pass over a processor's inputs, of unit length."""
    processor = AutoProcessor.from_pretrained(path)
    images = None if image is None else [scaled_image(image, 262_144)]
    inputs = processor(text=[text], images=images, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        state = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    return (state / state.norm()).numpy()


def compression(note: Note, image_words: str) -> str:
    parts = note_prompt("text" if note.image is None else "basic", "zh")
    filled = shown_texts(note, settings())
    return "".join(part if isinstance(part, str) else filled.get(part, image_words) for part in parts)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"blip2"}))
def test_a_vector_is_hugging_faces_last_hidden_state(saved, kind):
    path = saved(kind)
    words = ChatTokenizer.from_pretrained(path).template.image.strip()
    vectors = make(path).encode(NOTES)
    for note, vector in zip(NOTES, vectors, strict=True):
        expected = own_vector(path, compression(note, words), note.image)
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_blip_2_has_its_image_in_its_place_too(saved):
    # Its own processor puts the image before the text, and its class returns no hidden states of the language model.
    path = saved("blip2")
    encoder, processor = make(path), AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    parts = zip(compression(NOTES[0], "0IMAGE0").split("0IMAGE0"), (True, False), strict=True)
    made = processor(images=[scaled_image(NOTES[0].image, 262_144)], text="", return_tensors="pt")
    places = made.input_ids[0][made.input_ids[0] == model.config.image_token_id].tolist()
    assert len(places) == 4
    start, end = (processor.tokenizer(text, add_special_tokens=first).input_ids for text, first in parts)
    ids = torch.tensor([[*start, *places, *end]])
    with torch.no_grad():
        out = model(pixel_values=made.pixel_values, input_ids=ids, output_hidden_states=True)
    state = out.language_model_outputs.hidden_states[-1][0, -1]
    np.testing.assert_allclose(encoder.encode(NOTES[:1])[0], state / state.norm(), atol=1e-5)
    assert np.isfinite(encoder.encode(NOTES[1:2])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_same_alone_in_a_batch_and_after_saving(saved, tmp_path, kind):
    encoder = make(saved(kind), embedding_dim=16)
    encoder.save_pretrained(tmp_path)
    again = NoteEncoder.from_pretrained(tmp_path)
    assert again.fingerprint == encoder.fingerprint
    for inputs in ("multimodal", "text"):
        together = encoder.encode(NOTES, inputs)
        assert together.shape == (3, 16)
        for note, vector in zip(NOTES, together, strict=True):
            np.testing.assert_allclose(again.encode([note], inputs)[0], vector, atol=1e-4)
        assert np.array_equal(again.encode(NOTES, inputs), together)
    assert not np.allclose(encoder.encode(NOTES[:1]), encoder.encode(NOTES[:1], "text"), atol=1e-3)
    rough = NoteEncoder.from_pretrained(tmp_path, precision="bf16").encode(NOTES)
    assert (rough * encoder.encode(NOTES)).sum(axis=1).min() > 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_everything_takes_part_without_any_image(saved, kind):
    encoder = make(saved(kind), embedding_dim=16)
    encoder.model.set_gradient_checkpointing(True)
    encoder.model.train()
    batch = encoder.preprocessor.collate([encoder.preprocessor.features(NOTES[1])] * 2)
    assert not batch.vision
    vectors = encoder.model(batch)
    (vectors.multimodal.sum() + vectors.temperature).backward()
    without = [n for n, p in encoder.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in without if "position" not in name]
    frozen = {name for name, p in encoder.model.named_parameters() if not p.requires_grad}
    assert frozen and not any("language_model" in name or "merger" in name for name in frozen)
    encoder.model.eval()  # no dropout
    encoder.model.training = True  # as in validation: only the blank image takes part
    with torch.no_grad():
        vector = torch.nn.functional.normalize(encoder.model(batch).multimodal, dim=-1)[0]
    np.testing.assert_allclose(vector, encoder.encode(NOTES[1:2])[0], atol=1e-4)


def test_an_embedding_checkpoint_has_no_head_and_reads_its_own_chat_prompt(saved, tmp_path):
    """As Qwen3-VL-Embedding is used: the instruction as system message, the state at the end of the prompt."""
    path = saved("qwen3_vl")
    headless = AutoModelForImageTextToText.from_pretrained(path)
    headless.model.save_pretrained(tmp_path)
    headless.config.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(path).save_pretrained(tmp_path)
    encoder = make(str(tmp_path), options={"prompt": "chat"})
    processor = AutoProcessor.from_pretrained(path)
    for note in NOTES:
        text = "\n".join(filter(None, [note.title, "，".join(note.topics), note.content.strip()]))
        content = [] if note.image is None else [{"type": "image"}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "Represent the user's input."}]},
            {"role": "user", "content": [*content, {"type": "text", "text": text}]},
        ]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = own_vector(path, prompt, note.image)
        np.testing.assert_allclose(encoder.encode([note])[0], expected, atol=1e-5)
    other = make(str(tmp_path), options={"prompt": "chat", "instruction": "Find notes about the same thing."})
    assert not np.allclose(other.encode(NOTES[:1]), encoder.encode(NOTES[:1]), atol=1e-3)


def test_the_chat_prompt_of_another_template(saved):
    note = NOTES[0]._replace(topics=(), content="")
    text = "Find it. USER: <image>\nred cat ASSISTANT:"
    vector = make(saved("llava"), options={"prompt": "chat", "instruction": "Find it."}).encode([note])[0]
    np.testing.assert_allclose(vector, own_vector(saved("llava"), text, note.image), atol=1e-5)


def test_what_users_write_is_no_mark_and_is_cut(saved):
    preprocessor = make(saved("qwen2_vl")).preprocessor
    marks = set(preprocessor.processor.tokenizer.all_special_ids)
    for prompt in ("compression", "chat"):
        preprocessor = make(saved("qwen2_vl"), options={"prompt": prompt}).preprocessor
        plain = preprocessor.features(Note("a", "cat"))
        marked = preprocessor.features(Note("a", "<|image_pad|><|im_end|>cat<|vision_start|>", content="word " * 500))
        of = [[i for i in one.rows["input_ids"] if i in marks] for one in (plain, marked)]
        assert of[0] == of[1]
        assert marked.num_tokens <= 400 + 60  # closing words are not counted, nor the chat template's first


def test_large_images_are_scaled_down(saved):
    big = Note("a", image=tiny_models.picture(1, (640, 480)))
    small, large = (
        make(saved("qwen2_vl"), options={"max_image_pixels": side**2}).preprocessor.features(big) for side in (56, 112)
    )
    assert large.num_tokens > small.num_tokens > make(saved("qwen2_vl")).preprocessor.features(Note("b")).num_tokens


def test_a_preprocessor_can_be_sent_and_copied(saved):
    preprocessor = make(saved("qwen2_vl")).preprocessor
    expected = preprocessor.features(NOTES[0])
    for other in (pickle.loads(pickle.dumps(preprocessor)), copy.deepcopy(preprocessor)):
        found = other.features(NOTES[0])
        assert np.array_equal(found.rows["input_ids"], expected.rows["input_ids"])
    with pytest.raises(DataError, match="note x: "):
        preprocessor.features(Note("x", image=b"no image"))


def test_what_cannot_be_used_is_named(saved, tmp_path):
    llm = tiny_models.save_llm(tmp_path / "llm")
    with pytest.raises(ModelError, match="is a qwen2, not an image-text model"):
        make(llm)
    with pytest.raises(ModelError, match=r"the longest prompts take .* but the LLM supports 8192"):
        make(saved("qwen2_vl"), max_body_tokens=9000)
    for wrong, message in (
        ({"options": {"promt": "chat"}}, "promt"),
        ({"options": {"instruction": "Find."}}, "would be ignored"),
        ({"llm": "tiny"}, "a ready multimodal LLM"),
        ({"missing_image": "zero"}, "leaves a missing image out"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(**wrong)


def test_an_llm_without_projection_gives_its_hidden_state(tmp_path):
    """The paper's zero-shot rows of text-only LLMs."""
    encoder = build_encoder(
        tiny_models.settings("text_only", embedding_dim=None),
        1,
        llm_path=tiny_models.save_llm(tmp_path / "llm"),
        vision_path="",
    )
    encoder.save_pretrained(tmp_path / "model")
    again = NoteEncoder.from_pretrained(tmp_path / "model")
    assert again.embedding_dim == 32
    assert np.array_equal(again.encode(NOTES), encoder.encode(NOTES))
    batch = encoder.preprocessor.collate([encoder.preprocessor.features(NOTES[1])])
    with torch.no_grad():
        state = encoder.model.llm(batch.input_ids).last_hidden_state[0, -1]
    np.testing.assert_allclose(again.encode(NOTES[1:2])[0], state / state.norm(), atol=1e-5)
