"""LoRA on an embedder's LLM: what is saved is a plain embedder with the same vectors, whatever the kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import LoraSettings, ModelSettings
from notellm2_ray.models.embedder.adapt import adapt_llm, save_merged
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.lora import is_lora
from tests.support import architectures, tiny_models

LORA = LoraSettings(rank=4, alpha=8)
MLLMS = ("qwen2_5_vl", "blip2")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("parts")
    made = {kind: tiny_models.save_llm(base / kind, kind) for kind in tiny_models.LLMS}
    made |= {kind: architectures.save(kind, base / kind) for kind in MLLMS}
    return {**made, "clip": tiny_models.save_clip(base / "clip")}


def make(parts: dict[str, str], case: str) -> NoteEncoder:
    if case in MLLMS:
        settings = build(
            ModelSettings, {"kind": "mllm", "llm": "somewhere", "embedding_dim": 16, "max_body_tokens": 400}
        )
    else:
        settings = tiny_models.settings()
    return build_encoder(settings, 1, llm_path=parts[case], vision_path=parts["clip"])


@pytest.mark.parametrize("case", [*tiny_models.LLMS, *MLLMS])
def test_a_merged_embedder_gives_the_vectors_of_the_adapted_one(parts, tmp_path, case):
    adapted, notes = make(parts, case), tiny_models.notes(4, without_image=[1])
    before = adapted.encode(notes)
    adapt_llm(adapted, LORA, seed=1)
    np.testing.assert_array_equal(adapted.encode(notes), before)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if is_lora(name):
                parameter.normal_(std=0.2)
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert any(not is_lora(name) for name in trained)
    vectors = adapted.encode(notes)
    assert np.abs(vectors - before).max() > 1e-2
    save_merged(make(parts, case), LORA, trained, tmp_path)
    np.testing.assert_allclose(NoteEncoder.from_pretrained(tmp_path).encode(notes), vectors, atol=1e-5)


def test_a_variant_without_an_llm_is_refused_by_name(parts):
    encoder = build_encoder(tiny_models.settings("image_only"), 1, llm_path=parts["qwen2"], vision_path=parts["clip"])
    with pytest.raises(ConfigError, match=r"model.kind=notellm2, model.variant=image_only trains none"):
        adapt_llm(encoder, LORA, seed=1)
