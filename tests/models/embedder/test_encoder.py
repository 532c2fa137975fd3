"""The embedder: vectors, the self-describing directory, and refused models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, CLIPModel, T5Config

from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.models.embedder import storage
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder, batches_by_length
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.llm import load_llm
from tests.support import tiny_models


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = tmp_path_factory.mktemp("parts")
    return {"llm": tiny_models.save_llm(base / "llm"), "clip": tiny_models.save_clip(base / "clip")}


def make(parts, variant="notellm2", **changes) -> NoteEncoder:
    settings = tiny_models.settings(variant, **changes)
    return build_encoder(settings, 1, llm_path=parts["llm"], vision_path=parts["clip"])


@pytest.fixture
def saved(parts, tmp_path) -> Path:
    make(parts).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_embedder_gives_the_same_vectors(parts, tmp_path, variant):
    encoder = make(parts, variant, prompt_language="en", max_content_words=7, missing_image="zero")
    notes = tiny_models.notes(5, without_image=[3])
    encoder.save_pretrained(tmp_path)
    again = NoteEncoder.from_pretrained(tmp_path)
    for inputs in ("multimodal", "image", "text"):
        assert np.array_equal(again.encode(notes, inputs), encoder.encode(notes, inputs))
    assert again.settings == encoder.settings
    assert again.fingerprint == encoder.fingerprint
    assert not again.model.training
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix not in (".json", ".jinja")) == [
        ".safetensors"
    ]


def test_siglip_embedders_survive_too(parts, tmp_path):
    siglip = tiny_models.save_siglip(tmp_path / "siglip")
    for variant in ("basic", "late_fusion"):  # the first of them drops the tower's pooling head
        encoder = build_encoder(tiny_models.settings(variant), 1, llm_path=parts["llm"], vision_path=siglip)
        encoder.save_pretrained(tmp_path / variant)
        notes = tiny_models.notes(2)
        assert np.array_equal(NoteEncoder.from_pretrained(tmp_path / variant).encode(notes), encoder.encode(notes))


@pytest.mark.parametrize("variant", ["late_fusion", "image_only"])
@pytest.mark.parametrize("pooling", ["projected", "mean"])
def test_an_embedder_with_another_pooled_vector_survives(parts, tmp_path, variant, pooling):
    encoder, notes = make(parts, variant, vision_pooling=pooling), tiny_models.notes(3)
    encoder.save_pretrained(tmp_path)
    again = NoteEncoder.from_pretrained(tmp_path)
    assert again.settings.vision_pooling == pooling
    assert np.array_equal(again.encode(notes), encoder.encode(notes))
    assert not np.allclose(make(parts, variant).encode(notes), encoder.encode(notes), atol=1e-2)


def test_clips_own_vector_as_a_note_vector(parts):
    encoder = make(parts, "image_only", vision_pooling="projected", embedding_dim=None)
    notes = tiny_models.notes(3)
    pixels = np.stack([encoder.preprocessor.features(note).pixels for note in notes])
    inputs = torch.from_numpy(encoder.preprocessor.image.normalised(pixels))
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(parts["clip"]).eval().get_image_features(inputs).pooler_output
    assert np.allclose(encoder.encode(notes), torch.nn.functional.normalize(theirs, dim=1).numpy(), atol=1e-5)


def test_a_pooling_at_its_default_is_not_written(saved):
    assert "vision_pooling" not in json.loads((saved / "config.json").read_text())["settings"]


def test_large_weights_are_sharded_and_read_again(parts, tmp_path):
    encoder = make(parts)
    encoder.save_description(tmp_path)
    storage.save_weights(encoder.model.state_dict(), tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert NoteEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"is incomplete: {shards[0].name} is missing"):
        NoteEncoder.from_pretrained(tmp_path)


def test_the_fingerprint_tells_weights_and_settings_apart(parts):
    encoder = make(parts)
    before = encoder.fingerprint
    assert before == encoder.fingerprint == make(parts).fingerprint
    assert make(parts, max_content_words=79).fingerprint != before
    with torch.no_grad():
        encoder.model.projection.weight[0, 0] += 1e-3
    assert encoder.fingerprint != before


def test_vectors_are_cut_to_the_lengths_that_were_trained(parts, tmp_path):
    whole, notes = make(parts), tiny_models.notes(3, without_image=[1])
    whole.save_pretrained(tmp_path / "whole")
    assert "dimensions" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    encoder = NoteEncoder(whole.model, whole.preprocessor, (16, 4, 8))
    encoder.save_pretrained(tmp_path / "model")
    again = NoteEncoder.from_pretrained(tmp_path / "model")
    assert again.lengths == (16, 8, 4)
    assert again.fingerprint == encoder.fingerprint != whole.fingerprint
    vectors = again.encode(notes)
    assert np.array_equal(vectors, again.encode(notes, dimensions=16))
    cut = again.encode(notes, dimensions=4)
    expected = vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True)
    assert np.allclose(cut, expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"no vectors of 5 numbers: ask for 16 or 8 or 4"):
        again.encode(notes, dimensions=5)
    with pytest.raises(ConfigError, match=r"ask for 16, or train further lengths with train.dimensions"):
        whole.encode(notes, dimensions=4)
    short = NoteEncoder.from_pretrained(tmp_path / "model", dimensions=8)
    assert (short.embedding_dim, short.lengths) == (8, (8, 4))
    assert np.array_equal(short.encode(notes), again.encode(notes, dimensions=8))
    assert short.fingerprint != again.fingerprint  # their vectors cannot be compared


@pytest.mark.parametrize(("batch_tokens", "max_notes"), [(1, 256), (150, 256), (16_384, 3), (16_384, 256)])
def test_encoding_keeps_the_order_in_any_batches(parts, batch_tokens, max_notes):
    encoder, notes = make(parts), tiny_models.notes(9, without_image=[4])
    vectors = encoder.encode(notes, batch_tokens=batch_tokens, max_batch_notes=max_notes)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for note, vector in zip(notes, vectors, strict=True):
        assert np.allclose(encoder.encode([note])[0], vector, atol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.embedding_dim)


def test_batches_on_a_cpu_are_small_unless_set(parts):
    encoder, sizes = make(parts), []
    encoder.model.register_forward_hook(lambda module, args, vectors: sizes.append(len(vectors.multimodal)))
    notes = tiny_models.notes(40)
    encoder.encode(notes)
    encoder.encode(notes, max_batch_notes=256)
    assert sizes == [32, 8, 40]


def test_batches_stay_within_their_bounds():
    lengths = [5, 100, 7, 6, 300, 5, 5]
    batches = list(batches_by_length(lengths, 100, 3))
    assert sorted(np.concatenate(batches)) == list(range(7))
    for rows in batches:
        assert len(rows) <= 3
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 100


def test_bfloat16_vectors_are_close(saved):
    notes = tiny_models.notes(4)
    exact, rough = (NoteEncoder.from_pretrained(saved, precision=p).encode(notes) for p in ("fp32", "bf16"))
    assert (exact * rough).sum(axis=1).min() > 0.99


def test_the_error_for_non_finite_vectors_names_the_notes(parts):
    encoder, notes = make(parts, "late_fusion"), tiny_models.notes(3, without_image=[1])
    expected = encoder.encode(notes)
    with torch.no_grad():
        encoder.model.fusion.visual.weight.fill_(torch.nan)
    with pytest.raises(DataError, match=r"not finite for 2 of 3 notes \(n0, n2\)"):
        encoder.encode(notes)
    vectors = encoder.encode_features([encoder.preprocessor.features(note) for note in notes])
    assert np.isfinite(vectors).all(axis=1).tolist() == [False, True, False]
    np.testing.assert_array_equal(vectors[1], expected[1])


def test_flash_attention_of_training_is_not_needed_on_a_cpu(saved):
    path = saved / "config.json"
    values = json.loads(path.read_text())
    values["settings"]["attention"] = "flash_attention_2"
    path.write_text(json.dumps(values))
    assert NoteEncoder.from_pretrained(saved).encode(tiny_models.notes(1)).shape == (1, 16)


def test_a_repository_of_the_hub_is_downloaded(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"me/notes": str(saved)}.__getitem__)
    assert NoteEncoder.from_pretrained("me/notes").settings == NoteEncoder.from_pretrained(saved).settings

    def absent(name):
        raise OSError("404")

    monkeypatch.setattr("huggingface_hub.snapshot_download", absent)
    with pytest.raises(ModelError, match="no directory me/other, and the hub gives no such repository: 404"):
        NoteEncoder.from_pretrained("me/other")


def write_config(directory: Path, config) -> str:
    config.save_pretrained(directory)
    return str(directory)


def test_only_causal_lms_are_accepted(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "empty"): "no config.json",
        parts["clip"]: "is a clip, not a causal language model",
        write_config(tmp_path / "t5", T5Config()): "is a t5, an encoder-decoder",
        write_config(tmp_path / "bert", BertConfig()): "is a bert, a masked language model",
        str(tmp_path / "absent" / "x" / "y"): "cannot be read as a model",
    }
    for path, message in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            load_llm(path, "sdpa")
        assert "model.llm needs" in str(caught.value)


def test_only_vision_towers_are_accepted(parts, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in {str(tmp_path / "empty"): "no config.json", parts["llm"]: "is a qwen2, which has no"}.items():
        with pytest.raises(ModelError, match=message):
            build_encoder(tiny_models.settings(), 1, llm_path=parts["llm"], vision_path=path)


def drop_weight(path: Path, name: str) -> None:
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


def test_incomplete_parts_are_refused(tmp_path):
    llm, clip = tiny_models.save_llm(tmp_path / "llm"), tiny_models.save_clip(tmp_path / "clip")
    drop_weight(tmp_path / "clip" / "model.safetensors", "vision_model.encoder.layers.1.mlp.fc1.weight")
    with pytest.raises(ModelError, match=r"clip lacks 1 of its model's weights .*layers.1.mlp.fc1.weight"):
        build_encoder(tiny_models.settings(), 1, llm_path=llm, vision_path=clip)
    drop_weight(tmp_path / "llm" / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"llm lacks 1 of its model's weights .*up_proj"):
        build_encoder(tiny_models.settings(), 1, llm_path=llm, vision_path=clip)
    (tmp_path / "llm" / "model.safetensors").rename(tmp_path / "llm" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Only safetensors are read"):
        build_encoder(tiny_models.settings(), 1, llm_path=llm, vision_path=clip)
    (tmp_path / "llm" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        build_encoder(tiny_models.settings(), 1, llm_path=llm, vision_path=clip)


def test_prompts_longer_than_the_llm_supports_are_refused(parts):
    with pytest.raises(ModelError, match=r"take 5\d\d tokens, but the LLM supports 512"):
        make(parts, max_body_tokens=500)


def test_directories_of_other_models_are_refused(parts, tmp_path):
    with pytest.raises(ModelError, match="of kind 'qwen2', not an embedder"):
        NoteEncoder.from_pretrained(parts["llm"])
    with pytest.raises(ModelError, match=r"holds no embedder: config.json is missing"):
        NoteEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        NoteEncoder.from_pretrained(tmp_path)


def test_damaged_embedders_are_refused(saved):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    drop_weight(weights, "fusion.gate.bias")
    with pytest.raises(ModelError, match=r"1 differ, first fusion.gate.bias \(expected \(32,\), found none\)"):
        NoteEncoder.from_pretrained(saved)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        NoteEncoder.from_pretrained(saved)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model.safetensors is missing"):
        NoteEncoder.from_pretrained(saved)
    values = json.loads((saved / "config.json").read_text())
    for change, message in (
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"settings": {"variant": "other"}}, "does not describe an embedder: setting 'variant'"),
    ):
        (saved / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ModelError, match=message):
            NoteEncoder.from_pretrained(saved)


@pytest.mark.slow
def test_models_do_not_import_ray():
    code = (
        "import sys, notellm2_ray.models.embedder.build, notellm2_ray.models.embedder.losses\n"
        "print([m for m in ('ray', 'vllm', 'deepspeed', 'open_clip', 'faiss', 'lance') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class Moves(TorchDispatchMode):
    """Bytes and types of what is moved from the CPU to a fake card, torch's device ``meta``."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) and args[0].device.type == "cpu" and made.device.type == "meta":
            self.moved.append((made.dtype, made.nbytes))
        return made


def test_a_card_never_holds_the_weights_in_another_precision(parts, tmp_path):
    make(parts).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    with Moves() as moves:
        encoder = NoteEncoder.from_pretrained(tmp_path, "meta", "bf16")
    wide = [size for dtype, size in moves.moved if dtype != torch.bfloat16]
    assert sum(wide) <= encoder.model.temperature.nbytes + sum(one.nbytes for one in encoder.model.buffers())
    assert sum(size for _, size in moves.moved) < 0.6 * sum(tensor.nbytes for tensor in stored.values())
    assert encoder.device.type == "meta"


@pytest.mark.parametrize("variant", ["notellm2", "late_fusion"])
def test_weights_cast_one_by_one_are_those_of_a_whole_cast(parts, tmp_path, variant):
    encoder = make(parts, variant)
    encoder.save_pretrained(tmp_path)
    encoder.model.to_precision("bf16")
    assert NoteEncoder.from_pretrained(tmp_path, precision="bf16").fingerprint == encoder.fingerprint
