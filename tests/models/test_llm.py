"""LLMs of several families, with the habits of their tokenizers: the state that is read, padding, saving, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers.processors import TemplateProcessing

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.schema import Note
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.embedder.losses import embedder_loss
from notellm2_ray.models.embedder.preprocess import NotePreprocessor
from notellm2_ray.models.llm import IMAGE_TOKEN, embed_added_tokens, load_llm, load_tokenizer
from tests.support import tiny_models

SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    initializer_range=0.1,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=0,
)
WINDOW = {"sliding_window": 8}  # less than a prompt
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
HEAD = {"head_dim": 16}
TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=32)


def gemma3(vocab_size: int) -> Any:
    text = SIZES | HEAD | WINDOW | LAYERS | {"vocab_size": vocab_size}
    config = hf.Gemma3Config(text_config=text, vision_config=TOWER | {"patch_size": 8}, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl(vocab_size: int) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 10_000.0}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=32)
    text = SIZES | {"vocab_size": vocab_size, "rope_parameters": rope}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def plain(kind: str, **more: Any) -> Callable[[int], Any]:
    config = getattr(hf, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")
    return lambda size: getattr(hf, f"{kind}ForCausalLM")(config(**SIZES | more, vocab_size=size))


class Family(NamedTuple):
    make: Callable[[int], Any]
    bos: bool  # whether the tokenizer puts a token before every text
    pads: bool  # whether it has a token for padding
    spare: int  # rows of the embedding table beyond the tokenizer's tokens


FAMILIES = {
    "llama": Family(plain("Llama", **HEAD), bos=True, pads=False, spare=0),
    "qwen2": Family(plain("Qwen2", tie_word_embeddings=True), bos=False, pads=True, spare=64),
    "qwen3": Family(plain("Qwen3", **HEAD, tie_word_embeddings=True), bos=False, pads=True, spare=64),
    "mistral": Family(plain("Mistral", **HEAD, **WINDOW), bos=True, pads=False, spare=0),
    "gemma3": Family(plain("Gemma3", **HEAD, **WINDOW, **LAYERS), bos=True, pads=True, spare=64),
    "phi": Family(plain("Phi"), bos=False, pads=False, spare=50),
    "phi4": Family(plain("Phi3", **WINDOW), bos=False, pads=True, spare=0),
    "gemma3, multimodal": Family(gemma3, bos=True, pads=True, spare=64),
    "qwen2.5-vl": Family(qwen2_5_vl, bos=False, pads=True, spare=64),
}


def save(directory: Path, family: Family) -> str:
    words = tiny_models.tokenizer()
    if not family.pads:
        words.pad_token = None
    if family.bos:
        words.add_special_tokens({"bos_token": "<s>"})
        start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.bos_token_id)])
        words.backend_tokenizer.post_processor = start
    torch.manual_seed(0)
    family.make(len(words) + family.spare).to(torch.bfloat16).save_pretrained(directory)
    words.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Callable[[str], str]:
    base = tmp_path_factory.mktemp("llms")
    made = {"clip": tiny_models.save_clip(base / "clip")}

    def path(name: str) -> str:
        if name not in made:
            made[name] = save(base / name, FAMILIES[name])
        return made[name]

    return path


def make(parts, name, variant="notellm2", **changes) -> NoteEncoder:
    settings = tiny_models.settings(variant, **changes)
    return build_encoder(settings, 1, llm_path=parts(name), vision_path=parts("clip"))


def batch_of(encoder, notes):
    return encoder.preprocessor.collate([encoder.preprocessor.features(note) for note in notes])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_is_the_models_own_after_its_final_norm(parts, name):
    encoder = make(parts, name, "text_only")
    batch = batch_of(encoder, tiny_models.notes(1))
    whole = hf.AutoModelForImageTextToText if "vl" in name or "multi" in name else hf.AutoModelForCausalLM
    theirs = whole.from_pretrained(parts(name), dtype=torch.float32).eval()
    with torch.no_grad():
        states = theirs(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[-1]
    expected = encoder.model.projection(states[:, -1])
    assert torch.allclose(encoder.model(batch).multimodal, expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_and_saving_change_no_vector(parts, tmp_path, name):
    encoder, notes = make(parts, name), tiny_models.notes(5, without_image=[2])
    together = encoder.model(batch_of(encoder, notes))
    for row, note in enumerate(notes):
        alone = encoder.model(batch_of(encoder, [note]))
        assert torch.allclose(alone.multimodal[0], together.multimodal[row], atol=1e-5)
        assert torch.allclose(alone.visual[0], together.visual[row], atol=1e-5)
    encoder.save_pretrained(tmp_path)
    assert np.array_equal(NoteEncoder.from_pretrained(tmp_path).encode(notes), encoder.encode(notes))
    rough = NoteEncoder.from_pretrained(tmp_path, precision="bf16").encode(notes)
    assert (rough * encoder.encode(notes)).sum(axis=1).min() > 0.98


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_the_same_gradient_with_checkpointing(parts, name):
    gradients = []
    for enabled in (False, True):
        encoder = make(parts, name)
        encoder.model.set_gradient_checkpointing(enabled)
        output = encoder.model.train()(batch_of(encoder, tiny_models.notes(4)))
        embedder_loss(output, torch.arange(4), alpha=9.0).total.backward()
        trained = [value for value in encoder.model.parameters() if value.requires_grad]
        gradients.append([value.grad for value in trained])
    assert all(value is not None for value in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_prompts_begin_as_the_tokenizer_begins_a_text(parts, name):
    encoder = make(parts, name, "text_only")
    ids = encoder.preprocessor.features(tiny_models.notes(1)[0]).input_ids
    words = hf.AutoTokenizer.from_pretrained(parts(name))
    assert (ids[0] == words.bos_token_id) == FAMILIES[name].bos
    assert ids.tolist() == words(words.decode(ids, skip_special_tokens=True)).input_ids


@pytest.mark.parametrize("mark", ["<|start_header_id|>", "[INST]", "<start_of_turn>", "<|user|>"])
@pytest.mark.parametrize("special", [True, False])
def test_chat_marks_in_a_note_are_words(parts, tmp_path, mark, special):
    words = tiny_models.tokenizer()
    words.add_tokens([hf.AddedToken(mark, special=special)])
    words.save_pretrained(tmp_path)
    preprocessor = NotePreprocessor(tiny_models.settings("text_only"), load_tokenizer(str(tmp_path)), None)
    ids = preprocessor.features(Note("a", f"red {mark} cat", content=mark)).input_ids
    assert words.convert_tokens_to_ids(mark) not in ids
    assert mark.strip("<>[]|") in words.decode(ids)


def test_gemma_scales_its_words_and_not_the_visual_tokens(parts):
    """As Gemma 3 itself treats its own image features: they enter the LLM as they are."""
    model = make(parts, "gemma3").model
    ids = torch.tensor([[5, 6]])
    assert torch.allclose(model.llm.get_input_embeddings()(ids), model.llm.embed_tokens.weight[ids] * 32**0.5)
    batch = batch_of(make(parts, "gemma3"), tiny_models.notes(1))
    seen: dict[str, torch.Tensor] = {}
    model.llm.layers[0].register_forward_pre_hook(lambda _, args: seen.setdefault("input", args[0]))
    model(batch)
    start = int(batch.image_starts[0])
    tokens = model.connector(model.tower(batch.pixels).patches)
    assert torch.allclose(seen["input"][:, start : start + 4], tokens, atol=1e-6)


def test_a_vocabulary_with_gaps_gets_rows_for_the_new_tokens(parts, tmp_path):
    words = load_tokenizer(parts("llama"))
    llm = load_llm(parts("llama"), "sdpa")
    last = max(words.get_vocab().values())
    words.convert_tokens_to_ids = lambda tokens: [last + 10 + i for i, _ in enumerate(tokens)]
    embed_added_tokens(llm, words)
    table = llm.get_input_embeddings().weight
    assert len(table) == llm.config.vocab_size == last + 12
    assert IMAGE_TOKEN in words.get_vocab()


def test_attention_in_both_directions_is_refused(tmp_path):
    sizes = SIZES | HEAD | {"vocab_size": 100, "use_bidirectional_attention": True}
    hf.Gemma3TextConfig(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a gemma3_text with attention in both directions"):
        load_llm(str(tmp_path), "sdpa")
