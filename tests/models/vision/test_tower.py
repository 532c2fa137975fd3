"""Vision towers: the features of each family, and the conversion of OpenCLIP's towers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.vision.load import load_tower
from notellm2_ray.models.vision.openclip import vision_config
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.models.vision.tower import VisionTower, tower_from_config
from tests.support import tiny_models


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    return torch.from_numpy(noise)


def normalised(pixels: torch.Tensor, image: ImageSettings) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
    return (pixels / 255 - mean) / std


def test_clip_gives_patches_without_cls_and_cls_before_its_norm(tmp_path, pixels):
    path = tiny_models.save_clip(tmp_path)
    tower = load_tower(path, frozen=True)
    views = tower(pixels)
    states = CLIPVisionModel.from_pretrained(path)(normalised(pixels, tower.image)).last_hidden_state
    assert views.patches.shape == (2, tower.num_patches, tower.width) == (2, 16, 24)
    assert torch.allclose(views.patches, states[:, 1:], atol=1e-5)
    assert torch.allclose(views.pooled, states[:, 0], atol=1e-5)


def test_siglip_gives_patches_and_its_attention_pooling(tmp_path, pixels):
    path = tiny_models.save_siglip(tmp_path)
    tower = load_tower(path, frozen=True)
    assert (tower.image.resize, tower.image.mean) == ("squash", (0.5, 0.5, 0.5))
    output = SiglipVisionModel.from_pretrained(path)(normalised(pixels, tower.image))
    views = tower(pixels)
    assert torch.allclose(views.patches, output.last_hidden_state, atol=1e-5)
    assert torch.allclose(views.pooled, output.pooler_output, atol=1e-5)
    without = load_tower(path, frozen=True, pooling=None)
    assert without.model.head is None
    assert torch.allclose(without(pixels).pooled, output.last_hidden_state.mean(dim=1), atol=1e-5)


def test_siglip_without_an_image_processor_uses_the_default(tmp_path):
    tiny_models.save_siglip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_tower(str(tmp_path), frozen=True).image == ImageSettings(32, (0.5,) * 3, (0.5,) * 3, "squash")


def test_siglip2_patches_equal_those_of_its_own_processor(tmp_path, pixels):
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=8, num_patches=16))
    model.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), frozen=True)
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    inputs = processor(list(pixels), return_tensors="pt")
    expected = model.eval()(**inputs)
    views = tower(pixels)
    assert torch.allclose(views.patches, expected.last_hidden_state, atol=1e-5)
    assert torch.allclose(views.pooled, expected.pooler_output, atol=1e-5)


def save_openclip(directory, **changes):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=2, width=24, head_width=12, patch_size=8, mlp_ratio=2.1, **changes)
    text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, "quick_gelu": "norm_kwargs" in changes}
    model = open_clip.CLIP(8, vision, text, quick_gelu=config["quick_gelu"]).eval()
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    values = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}}
    (directory / "open_clip_config.json").write_text(json.dumps(values))
    return model


@pytest.mark.parametrize("changes", [{}, {"norm_kwargs": {"eps": 1e-3}}], ids=["gelu", "quick gelu, other eps"])
def test_an_openclip_tower_is_the_same_network_under_other_names(tmp_path, pixels, changes):
    theirs = save_openclip(tmp_path, **changes).visual
    tower = load_tower(str(tmp_path), frozen=True)
    assert (tower.image.mean, tower.image.resample) == ((0.1, 0.2, 0.3), 2)
    output = theirs.forward_intermediates(normalised(pixels, tower.image), output_fmt="NLC", output_extra_tokens=True)
    views = tower(pixels)
    assert torch.allclose(views.patches, output["image_intermediates"][-1], atol=1e-5)
    assert torch.allclose(views.pooled, output["image_intermediates_prefix"][-1][:, 0], atol=1e-5)


def test_openclip_by_name_with_a_file_of_weights(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    save_openclip(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config if name == "tiny" else None)
    named = load_tower(f"openclip:tiny:{tmp_path / 'open_clip_model.safetensors'}", frozen=True)
    weights, expected = (tower.model.state_dict() for tower in (named, load_tower(str(tmp_path), frozen=True)))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with pytest.raises(ModelError, match="no architecture 'other'"):
        load_tower("openclip:other", frozen=True)


def test_openclip_bigg_has_the_sizes_of_table_9():
    open_clip = pytest.importorskip("open_clip")
    from notellm2_ray.models.embedder.architectures import openclip_bigg

    found = vision_config(open_clip.get_model_config("ViT-bigG-14"), "bigG").to_dict()
    wanted = openclip_bigg().to_dict()
    assert {key: found[key] for key in wanted if key != "projection_dim"} == {
        key: value for key, value in wanted.items() if key != "projection_dim"
    }


def test_invalid_openclip_names():
    pytest.importorskip("open_clip")
    with pytest.raises(ModelError, match="choose one of its weights .*laion2b_s39b_b160k"):
        load_tower("openclip:ViT-bigG-14", frozen=True)
    with pytest.raises(ModelError, match="no plain vision transformer .timm_model_name"):
        vision_config({"vision_cfg": {"timm_model_name": "vit_so400m"}}, "x")
    with pytest.raises(ModelError, match="no plain vision transformer .ResNet"):
        vision_config({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "x")


def test_an_openclip_directory_whose_weights_do_not_fit(tmp_path):
    save_openclip(tmp_path)
    path = tmp_path / "open_clip_config.json"
    values = json.loads(path.read_text())
    values["model_cfg"]["vision_cfg"]["layers"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="does not fit its architecture; missing .*layers.2"):
        load_tower(str(tmp_path), frozen=True)


def test_a_frozen_tower_stays_in_evaluation_mode():
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    assert not VisionTower(model, ImageSettings(32), frozen=True).train().model.training
    tower = VisionTower(model, ImageSettings(32), frozen=False)
    assert tower.train().model.training
    assert not tower.eval().model.training


def save_clip_alone(directory) -> str:
    """CLIPVisionModelWithProjection's checkpoint, as CLIP's users search with."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    CLIPVisionModelWithProjection(config).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("whole", [True, False], ids=["whole CLIP", "vision half"])
def test_the_projected_vector_is_clips_image_embedding(tmp_path, pixels, whole):
    path = tiny_models.save_clip(tmp_path) if whole else save_clip_alone(tmp_path)
    tower = load_tower(path, frozen=False, pooling="projected")
    inputs = normalised(pixels, tower.image)
    if whole:
        expected = CLIPModel.from_pretrained(path).eval().get_image_features(inputs).pooler_output
    else:
        expected = CLIPVisionModelWithProjection.from_pretrained(path).eval()(inputs).image_embeds
    views = tower.eval()(pixels)
    assert tower.pooled_width == 8
    assert torch.allclose(views.pooled, expected, atol=1e-5)
    views.pooled.sum().backward()
    assert all(value.grad is not None for value in tower.parameters())
    again = tower_from_config(json.loads(json.dumps(tower.describe())), tower.image, frozen=True, pooling="projected")
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(pixels).pooled, views.pooled)


def test_other_poolings_are_of_the_same_states(tmp_path, pixels):
    clip, siglip = tiny_models.save_clip(tmp_path / "clip"), tiny_models.save_siglip(tmp_path / "siglip")
    auto, cls, mean = (load_tower(clip, frozen=True, pooling=how)(pixels) for how in ("auto", "cls", "mean"))
    assert torch.equal(auto.pooled, cls.pooled)
    assert torch.equal(mean.pooled, auto.patches.mean(dim=1))
    auto, shared = (load_tower(siglip, frozen=True, pooling=how)(pixels) for how in ("auto", "projected"))
    assert torch.equal(auto.pooled, shared.pooled)  # SigLIP compares this vector with texts as it is
    with pytest.raises(ModelError, match="has no CLS token"):
        load_tower(siglip, frozen=True, pooling="cls")
    ViTModel(ViTConfig(**sizes_of_vit())).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="has no projection into a space that it shares with texts"):
        load_tower(str(tmp_path / "vit"), frozen=True, pooling="projected")


def sizes_of_vit():
    return dict(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )


def test_the_projected_vector_of_an_openclip_is_its_own_image_feature(tmp_path, pixels):
    theirs = save_openclip(tmp_path)
    tower = load_tower(str(tmp_path), frozen=True, pooling="projected")
    expected = theirs.encode_image(normalised(pixels, tower.image))
    assert torch.allclose(tower(pixels).pooled, expected, atol=1e-5)
