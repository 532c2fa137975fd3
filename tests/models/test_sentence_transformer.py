"""The embedder's directory as a SentenceTransformer: the same vectors for texts, images and notes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings import ModelSettings
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.note_inputs import as_note, image_bytes
from notellm2_ray.models.sentence_transformer import NoteTransformer
from tests.support import architectures, tiny_models


def write(directory: Path, variant: str = "notellm2") -> Path:
    llm, clip = tiny_models.save_llm(directory / "llm"), tiny_models.save_clip(directory / "clip")
    encoder = build_encoder(tiny_models.settings(variant), 1, llm_path=llm, vision_path=clip)
    encoder.save_pretrained(directory / "model")
    return directory / "model"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def encoder(path) -> NoteEncoder:
    return NoteEncoder.from_pretrained(path)


@pytest.fixture(scope="module")
def model(path) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu", trust_remote_code=True)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_notes_with_and_without_images_get_the_same_vectors(model, encoder):
    notes = tiny_models.notes(9, without_image=[2, 5])
    expected = encoder.encode(notes)
    assert_same(model.encode(notes, batch_size=4), expected)
    assert_same(model.encode([note._asdict() for note in notes]), expected)
    assert model.get_embedding_dimension() == expected.shape[1] == 16


def test_texts_and_images_get_the_same_vectors_in_one_batch(model, encoder):
    data = tiny_models.picture(3)
    given = [
        "红色 cat",
        Image.open(io.BytesIO(data)),
        {"text": "sofa", "image": data},
        {"title": "sea", "topics": "a|b"},
    ]
    notes = [
        Note("0", content="红色 cat"),
        Note("1", image=data),
        Note("2", content="sofa", image=data),
        Note("3", "sea", ("a", "b")),
    ]
    assert_same(model.encode(given), encoder.encode(notes))
    assert_same(model.encode(given[:1]), encoder.encode(notes[:1]))
    assert_same(model.encode(given[0]), encoder.encode(notes[:1])[0])
    assert_same(model.encode(given[1]), encoder.encode(notes[1:2])[0])
    assert_same(model.encode({"image": data}), encoder.encode(notes[1:2])[0])
    message = {"role": "user", "content": [{"type": "text", "text": "sofa"}, {"type": "image", "image": data}]}
    assert_same(model.encode([[message], "红色 cat"]), encoder.encode([notes[2], notes[0]]))
    assert [model.supports(kind) for kind in ("text", "image", ("image", "text"), "audio")] == [True, True, True, False]


def test_similarity_normalisation_prompts_and_truncation(model, encoder):
    texts = ["red cat", "blue sofa", "旅行"]
    vectors = encoder.encode([Note("x", content=text) for text in texts])
    np.testing.assert_allclose(model.similarity(*[model.encode(texts)] * 2).numpy(), vectors @ vectors.T, atol=1e-5)
    assert_same(model.encode(texts, normalize_embeddings=True), vectors)
    assert_same(model.encode_query(texts), vectors)
    assert_same(model.encode_document(texts), vectors)
    cut = vectors[:, :6] / np.linalg.norm(vectors[:, :6], axis=1, keepdims=True)
    assert_same(model.encode(texts, truncate_dim=6, normalize_embeddings=True), cut)
    assert_same(model.encode(texts[1], prompt="red "), encoder.encode([Note("x", content="red blue sofa")])[0])
    assert model.encode([]).size == 0


def test_vectors_trained_for_several_lengths_are_cut_in_either_library(path, tmp_path):
    encoder = NoteEncoder.from_pretrained(path)
    encoder.trained_dimensions = (16, 6)
    encoder.save_pretrained(tmp_path)
    notes = tiny_models.notes(3)
    model = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True, truncate_dim=6)
    assert model.get_embedding_dimension() == 6
    assert_same(model.encode(notes, normalize_embeddings=True), encoder.encode(notes, dimensions=6))
    cut = SentenceTransformer(modules=[NoteTransformer(NoteEncoder.from_pretrained(tmp_path, dimensions=6))])
    assert_same(cut.encode(notes), encoder.encode(notes, dimensions=6))


def test_a_multimodal_llm_gives_the_same_vectors(tmp_path):
    settings = ModelSettings(kind="mllm", llm="somewhere", embedding_dim=None, max_body_tokens=400)
    path = architectures.save("qwen2_vl", tmp_path / "mllm")
    encoder = build_encoder(settings, 1, llm_path=path, vision_path="")
    encoder.save_pretrained(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    notes = tiny_models.notes(3, without_image=[1])
    assert_same(model.encode(notes), encoder.encode(notes))


def test_it_is_saved_and_loaded_again_by_either_library(model, encoder, path, tmp_path):
    model.save(str(tmp_path))
    again = NoteEncoder.from_pretrained(tmp_path)
    assert again.fingerprint == encoder.fingerprint
    files = {one.name for one in tmp_path.iterdir()}
    assert files - {"README.md"} == {one.name for one in path.iterdir()}
    notes = tiny_models.notes(2)
    for directory in (path, tmp_path):
        loaded = SentenceTransformer(str(directory), device="cpu", trust_remote_code=True)
        assert_same(loaded.encode(notes), encoder.encode(notes))


def test_the_class_needs_no_flag_and_code_of_the_directory_is_never_run(path, encoder):
    notes = tiny_models.notes(2)
    assert_same(SentenceTransformer(modules=[NoteTransformer.load(str(path))]).encode(notes), encoder.encode(notes))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(path))
    (module,) = json.loads((path / "modules.json").read_text())
    home, name = module["type"].rsplit(".", 1)
    assert (home, name) == (NoteTransformer.__module__, NoteTransformer.__name__)


def test_directories_of_before_still_load(path, encoder, tmp_path):
    for file in path.iterdir():
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            (tmp_path / file.name).symlink_to(file)
    assert NoteEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint


def test_precision_and_attention_are_chosen_as_elsewhere(path, encoder):
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    rough = SentenceTransformer(str(path), device="cpu", trust_remote_code=True, model_kwargs=options)
    assert next(rough[0].model.llm.parameters()).dtype == torch.bfloat16
    assert rough[0].model.llm.config._attn_implementation == "eager"
    notes = tiny_models.notes(2)
    assert (rough.encode(notes) * encoder.encode(notes)).sum(axis=1).min() > 0.99
    for wrong, message in (({"dtype": "float16"}, "dtype float16"), ({"gpus": 2}, "not gpus")):
        with pytest.raises(ModelError, match=message):
            NoteTransformer.load(str(path), model_kwargs=wrong)


@pytest.mark.parametrize(("variant", "wrong"), [("text_only", {"image": b"x"}), ("image_only", "red cat")])
def test_what_a_model_does_not_see_is_refused(tmp_path, variant, wrong):
    model = SentenceTransformer(modules=[NoteTransformer.load(str(write(tmp_path, variant)))])
    assert model.encode(tiny_models.notes(2)).shape == (2, 16)
    with pytest.raises(ValueError, match="not supported"):
        model.encode([wrong])


def test_one_picture_can_be_given_in_many_ways(tmp_path):
    data = tiny_models.picture(1)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    file = tmp_path / "a.png"
    file.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    arrays = [pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels.copy()), Image.fromarray(pixels)]
    for given in (data, bytearray(data), file, str(file), uri, {"bytes": data, "path": None}, *arrays):
        decoded = np.asarray(Image.open(io.BytesIO(image_bytes(given))).convert("RGB"))
        np.testing.assert_array_equal(decoded, pixels)
    for text in (str(file), uri):
        assert as_note(text).image == data


def test_a_pictures_orientation_is_kept():
    picture = Image.new("CMYK", (4, 2))
    picture.getexif()[0x0112] = 6
    assert Image.open(io.BytesIO(image_bytes(picture))).getexif()[0x0112] == 6


def test_a_text_about_a_file_stays_a_text():
    assert as_note("see absent.png").content == "see absent.png"
    assert as_note("https://example.com/page").content == "https://example.com/page"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.com/a.png", "not fetched from the network"),
        ({"image": "absent.png"}, "'absent.png' cannot be read"),
        ({"titel": "x"}, "no titel: its keys are"),
        ({"text": "a", "content": "b"}, "two names of one thing"),
        ({"title": float("nan")}, "title is nan, and has to be a text"),
        ((), "goes into a list too"),
        (7, "a int is no image"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        ({"role": "user", "content": [{"type": "audio", "audio": b""}]}, "not 'audio'"),
        ([{"role": "user", "content": [{"type": "image", "image": b""}] * 2}], "have 2"),
    ],
)
def test_other_inputs_are_refused_with_a_reason(given, message):
    with pytest.raises(DataError, match=message):
        as_note(given)


def test_a_single_note_is_not_taken_for_a_list(model):
    with pytest.raises(DataError, match="goes into a list too"):
        model.encode(tiny_models.notes(1)[0])
