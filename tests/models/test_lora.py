"""LoRA on any network: which layers, from which seed, in which types."""

from __future__ import annotations

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.llm import load_llm
from notellm2_ray.models.lora import add_lora, is_lora, store_frozen_linears_in_bf16
from tests.support import tiny_models

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny_models.save_llm(tmp_path_factory.mktemp("llm"))


def adapted(path: str, seed: int = 1, dtype: torch.dtype = torch.float32):
    llm = load_llm(path, "sdpa", dtype)
    return llm, add_lora(llm, rank=4, alpha=8, dropout=0.0, seed=seed)


def states(llm: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return llm(input_ids=IDS).last_hidden_state


def test_every_linear_layer_is_adapted_and_at_first_nothing_changes(path):
    llm, _ = adapted(path)
    trained = {name: p for name, p in llm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # A and B; two layers; q, k, v, o, gate, up, down
    assert all(is_lora(name) for name in trained)
    assert not any(is_lora(name) for name, p in llm.named_parameters() if not p.requires_grad)
    assert torch.equal(states(llm), states(load_llm(path, "sdpa")))


def test_the_matrices_depend_on_the_seed_alone(path):
    torch.manual_seed(3)
    first, again, other = (dict(adapted(path, seed)[0].named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ == {name for name in first if ".lora_A." in name}


def test_merging_gives_the_network_back_with_other_weights(path):
    llm, wrapped = adapted(path)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    said = states(llm)
    wrapped.merge_and_unload()
    plain = load_llm(path, "sdpa")
    assert llm.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(states(llm), said, atol=1e-5, rtol=1e-5)
    assert (states(plain) - said).abs().max() > 1e-2


def test_the_matrices_are_float32_beside_frozen_weights_in_bfloat16(path):
    llm, _ = adapted(path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in llm.named_parameters() if is_lora(name)} == {torch.float32}
    llm, _ = adapted(path)
    store_frozen_linears_in_bf16(llm)
    types = {name: p.dtype for name, p in llm.named_parameters()}
    in_bf16 = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert in_bf16 == {name for name in types if ".base_layer." in name}


def test_a_network_without_linear_layers_is_refused():
    class Nothing(PreTrainedModel):
        config_class = PretrainedConfig

    with pytest.raises(ModelError, match="no linear layer"):
        add_lora(Nothing(PretrainedConfig()), rank=4, alpha=8, dropout=0.0, seed=1)
