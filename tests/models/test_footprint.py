"""The sizes of networks that were never loaded are those of the networks themselves."""

from functools import partial

import pytest
import torch

from notellm2_ray.core.settings import LoraSettings, TuneSettings
from notellm2_ray.models.embedder.adapt import adapt_llm
from notellm2_ray.models.embedder.architectures import ARCHITECTURES
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.outline import embedder_outline
from notellm2_ray.models.footprint import footprint, saved_bytes
from notellm2_ray.models.lora import store_frozen_linears_in_bf16
from notellm2_ray.models.ranker.model import RankerModel, load_network
from notellm2_ray.models.ranker.outline import TOKENS, ranker_outline
from tests.support import tiny_models
from tests.support.tiny_mllm import save_mllm


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    llm, clip = tiny_models.save_llm(directory / "llm"), tiny_models.save_clip(directory / "clip")
    return {"llm_path": llm, "vision_path": clip, "mllm": save_mllm(directory / "mllm")}


def counted(network):
    parameters = list(network.parameters())
    frozen = sum(one.numel() * one.element_size() for one in parameters if not one.requires_grad)
    return sum(one.numel() for one in parameters), sum(one.numel() for one in parameters if one.requires_grad), frozen


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("variant", ["notellm2", "text_only", "image_only"])
@pytest.mark.parametrize("lora", [None, LoraSettings(dropout=0.0)])
def test_an_embedder_s_sizes_are_those_that_it_has(models, variant, lora, bf16):
    if lora is not None and variant == "image_only":
        return
    paths = {name: models[name] for name in ("llm_path", "vision_path")}
    settings = tiny_models.settings(variant)
    outline = embedder_outline(settings, lora, **paths, bf16=bf16)
    sizes = footprint(outline, bf16=bf16)
    encoder = build_encoder(settings, 0, **paths)
    if lora is not None:
        adapted = adapt_llm(encoder, lora, 0)
        if bf16:
            store_frozen_linears_in_bf16(adapted)
    network = encoder.model.train()
    # The two added tokens may enlarge the table of embeddings.
    parameters, trained, frozen = counted(network)
    assert sizes.parameters == pytest.approx(parameters, rel=0.01)
    assert sizes.trained == pytest.approx(trained, rel=0.01) and sizes.frozen == pytest.approx(frozen, rel=0.01)
    for checkpointing, each in ((False, sizes.kept), (True, sizes.recomputed)):
        network.set_gradient_checkpointing(checkpointing)
        few, many = (saved_bytes(network, partial(outline.run, network, count), bf16) for count in (3, 7))
        assert many - few == pytest.approx(4 * each, rel=0.02)
        if not checkpointing:
            assert few == pytest.approx(3 * each + sizes.copies, rel=0.02)


def test_the_ranker_s_sizes_are_those_that_it_has(models):
    tune = TuneSettings(lora_dropout=0.0)
    outline, vocabulary = ranker_outline(models["mllm"], tune, bf16=True)
    sizes = footprint(outline, bf16=True, tokens=TOKENS)
    network = RankerModel(load_network(models["mllm"], torch.bfloat16), tune).train()
    assert (sizes.parameters, sizes.trained, sizes.frozen) == counted(network)
    found = saved_bytes(network, lambda: outline.run(network, 3), bf16=True)
    assert found == pytest.approx(3 * TOKENS * sizes.kept + sizes.copies, rel=0.05)
    assert vocabulary == network.peft.get_base_model().get_output_embeddings().weight.shape[0]


@pytest.mark.slow
def test_full_size_activations_are_those_that_a_gpu_held(tmp_path):
    """An H200 held 38 GiB for 32 more notes of 176 tokens, and 2 GiB if they were recomputed (docs/experiments.md)."""
    architecture = ARCHITECTURES["mqwen-base"]
    architecture.llm().save_pretrained(tmp_path / "llm")
    tiny_models.tokenizer().save_pretrained(tmp_path / "llm")
    architecture.vision().save_pretrained(tmp_path / "clip")
    paths = {"llm_path": str(tmp_path / "llm"), "vision_path": str(tmp_path / "clip")}
    outline = embedder_outline(architecture.settings(), None, **paths, bf16=True)
    sizes = footprint(outline, bf16=True)
    assert sizes.parameters == pytest.approx(7.29e9, rel=0.001)
    assert sizes.copies == pytest.approx(2 * 6.6e9, rel=0.02)
    tokens = outline.run(_Shape(), 1)
    assert 32 * sizes.kept / 2**30 * 176 / tokens == pytest.approx(38, rel=0.05)
    assert 32 * sizes.recomputed / 2**30 * 176 / tokens == pytest.approx(2.5, rel=0.5)


class _Shape:
    """Stands for a network, to learn how long the prompts of an outline are."""

    def __call__(self, batch):
        return batch.input_ids.shape[1]
