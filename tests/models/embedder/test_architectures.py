"""The presets' networks, built without weights, have the sizes of Tables 7 and 9."""

from __future__ import annotations

import pytest

from notellm2_ray.models.embedder.architectures import ARCHITECTURES, clip_vit_b, openclip_bigg
from notellm2_ray.models.embedder.build import count_parameters
from notellm2_ray.models.embedder.network import meta_encoder

# Table 7, in millions: vision encoder, connector (queries and Q-Former), LLM, total of NoteLLM-2.
TABLE_7 = {
    "mtomato-base": (85.8, 49.6, 6_700, 6_900),
    "mqwen-base": (85.8, 49.6, 7_100, 7_300),
    "mqwen-bigg": (1_800, 142.9, 7_100, 9_200),
}


@pytest.mark.parametrize("name", TABLE_7)
def test_sizes_are_those_of_table_7(name):
    architecture = ARCHITECTURES[name]
    model = meta_encoder(architecture.settings(), architecture.llm(), architecture.vision())
    assert all(parameter.is_meta for parameter in model.parameters())
    parts = [model.tower, model.connector.qformer, model.llm, model]
    found = [count_parameters(part) / 1e6 for part in parts]
    for what, ours, printed in zip(("vision", "Q-Former", "LLM", "total"), found, TABLE_7[name], strict=True):
        print(f"{name:14s} {what:9s} {ours:9.1f} M, Table 7: {printed:g} M")
    tower, qformer, llm, total = TABLE_7[name]
    assert round(found[1], 1) == qformer
    assert round(found[0], 1) == tower if tower < 1000 else round(found[0] / 1000, 1) == tower / 1000
    assert round(found[2] / 1000, 1) == llm / 1000
    assert found[3] / 1000 == pytest.approx(total / 1000, abs=0.1)  # the projector between them is not in the table


@pytest.mark.parametrize(("config", "patches"), [(clip_vit_b, 196), (openclip_bigg, 256)])
def test_patches_are_those_of_table_9(config, patches):
    values = config()
    assert (values.image_size // values.patch_size) ** 2 == patches


@pytest.mark.parametrize(("variant", "has"), [("text_only", "llm"), ("image_only", "tower")])
def test_a_variant_has_only_the_parts_it_needs(variant, has):
    architecture = ARCHITECTURES["mtomato-base"]
    model = meta_encoder(architecture.settings(variant), architecture.llm(), architecture.vision())
    assert {name for name in ("llm", "tower", "connector", "fusion") if getattr(model, name, None) is not None} == {has}
