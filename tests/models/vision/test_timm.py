"""timm's models as towers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.vision.load import load_tower
from notellm2_ray.models.vision.processors import from_timm
from notellm2_ray.models.vision.timm_models import hub_name, parse
from tests.support import tiny_models

timm = pytest.importorskip("timm")


def weights_of(architecture: str, directory: Path):
    """The model as timm makes it, without its classifier, and its name with a file of weights that has one."""
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    save_file(model.state_dict(), directory / "weights.safetensors")
    model.reset_classifier(0)
    return model, f"timm:{architecture}:{directory / 'weights.safetensors'}"


@pytest.mark.parametrize("architecture", ["test_vit", "test_vit2", "test_vit3", "eva02_tiny_patch14_224"])
def test_a_tower_equals_timms_own_model_on_its_own_pixels(tmp_path, architecture):
    theirs, name = weights_of(architecture, tmp_path)
    tower = load_tower(name, frozen=False)
    picture = Image.open(io.BytesIO(tiny_models.picture(1, (300, 240)))).convert("RGB")
    pixels = tower.image.pixels(picture)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs), is_training=False)
    inputs = transform(picture)[None]
    levels = np.abs(tower.image.normalised(pixels) - inputs[0].numpy()) * np.array(tower.image.std)[:, None, None] * 255
    assert levels.max() < 0.01  # timm too resizes with Pillow
    states = theirs.forward_features(inputs)
    views = tower.eval()(torch.from_numpy(pixels)[None])
    assert views.patches.shape == (1, tower.num_patches, tower.width)
    assert torch.allclose(views.patches, states[:, theirs.num_prefix_tokens :], atol=1e-4)
    assert torch.allclose(views.pooled, theirs.forward_head(states), atol=1e-4)
    (views.patches.sum() + views.pooled.sum()).backward()
    assert all((value.grad is not None) == value.requires_grad for value in tower.parameters())


def test_a_saved_embedder_needs_no_hub_and_no_file(tmp_path):
    _, name = weights_of("test_vit", tmp_path)
    llm = tiny_models.save_llm(tmp_path / "llm")
    notes = tiny_models.notes(3)
    for variant, pooling in (("notellm2", "auto"), ("image_only", "mean")):
        settings = tiny_models.settings(variant, vision_pooling=pooling)
        encoder = build_encoder(settings, 1, llm_path=llm, vision_path=name)
        encoder.save_pretrained(tmp_path / variant)
        (tmp_path / "weights.safetensors").rename(tmp_path / "moved.safetensors")
        again = NoteEncoder.from_pretrained(tmp_path / variant)
        assert np.array_equal(again.encode(notes), encoder.encode(notes))
        again.model.set_gradient_checkpointing(True)
        (tmp_path / "moved.safetensors").rename(tmp_path / "weights.safetensors")


def test_a_directory_in_timms_own_format(tmp_path):
    theirs, _ = weights_of("test_vit", tmp_path)
    config = {"architecture": "test_vit", "num_classes": 1000, "num_features": 64}
    config["pretrained_cfg"] = {**theirs.pretrained_cfg, "classifier": "head"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "weights.safetensors").rename(tmp_path / "model.safetensors")
    tower = load_tower(str(tmp_path), frozen=True)
    assert tower.image == from_timm(timm.data.resolve_data_config(model=theirs), "")
    pixels = torch.zeros(1, 3, 160, 160, dtype=torch.uint8)
    expected = theirs.forward_features(torch.from_numpy(tower.image.normalised(pixels.numpy())))
    assert torch.allclose(tower(pixels).patches, expected[:, 1:], atol=1e-4)


def test_names_of_published_weights():
    for name in ("test_vit.r160_in1k", "eva02_base_patch14_224.mim_in22k"):
        assert hub_name(parse(f"timm:{name.replace('.', ':')}")) == f"timm/{name}"
    assert hub_name(parse("timm:test_vit")) == "timm/test_vit.r160_in1k"
    for name, message in {
        "timm:none": "no architecture 'none'",
        "timm:test_vit:other": "choose one of its weights .r160_in1k., or a .safetensors file",
        "timm:test_vit4": "there are none",
        "timm:test_vit:/absent.safetensors": "/absent.safetensors does not exist",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_tower(name, frozen=True)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext", "test_maxvit"])
def test_networks_without_patches_are_refused(tmp_path, architecture):
    _, name = weights_of(architecture, tmp_path)
    with pytest.raises(ModelError, match=f"timm:{architecture}.* no states of square patches|are not those of its"):
        load_tower(name, frozen=True)


def test_weights_of_another_architecture_are_refused(tmp_path):
    _, name = weights_of("test_vit", tmp_path)
    with pytest.raises(ModelError, match="does not fit its architecture"):
        load_tower(name.replace("test_vit", "test_vit3"), frozen=True)


def test_images_that_are_padded_are_refused():
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("test_vit").to_dict())
    with pytest.raises(ModelError, match="crop mode 'border'"):
        from_timm(config | {"crop_mode": "border"}, "x")
