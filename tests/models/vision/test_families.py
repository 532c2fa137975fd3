"""Towers of many families: each equals its own network on the pixels of its own image processor."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.vision.load import load_tower
from notellm2_ray.models.vision.tower import tower_from_config
from tests.support import tiny_models

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
TOWER = dict(SIZES, intermediate_size=48, image_size=32)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=50)
SQUARE = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class Family(NamedTuple):
    make: Callable[[], Any]  # the model that is saved
    processor: Any
    before: int  # states before the patches
    half: Callable[[Any], Any] = lambda model: model  # its vision encoder
    unused: tuple[str, ...] = ()  # trained parameters that nothing depends on
    head: bool = True  # whether its own pooled vector is used; False: CLS


def clip_like(kind: str) -> Callable[[], Any]:
    config = getattr(hf, f"{kind}Config")
    return lambda: getattr(hf, f"{kind}Model")(config(text_config=TEXT, vision_config=TOWER, projection_dim=8))


def blip2() -> Any:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    text = dict(model_type="opt", hidden_size=16, num_hidden_layers=1, num_attention_heads=1, ffn_dim=16, vocab_size=50)
    config = hf.Blip2Config(vision_config=TOWER, qformer_config=sizes, text_config=dict(text, word_embed_proj_dim=16))
    return hf.Blip2Model(config)


def llava() -> Any:
    return hf.LlavaModel(hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**TOWER)))


def vision_model(model: Any) -> Any:
    return model.vision_model


FAMILIES = {
    "dinov2": Family(
        lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, image_size=48)),
        hf.BitImageProcessor(**CROP, **IMAGENET),
        1,
        unused=("embeddings.mask_token",),
    ),
    "dinov2 with registers": Family(
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES, image_size=48)),
        hf.BitImageProcessor(**CROP, **IMAGENET),
        5,
        unused=("embeddings.mask_token",),
    ),
    "dinov3": Family(
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**TOWER, num_register_tokens=4)),
        hf.DINOv3ViTImageProcessor(**SQUARE),
        5,
        unused=("embeddings.mask_token",),
    ),
    "vit": Family(lambda: hf.ViTModel(hf.ViTConfig(**TOWER)), hf.ViTImageProcessor(**SQUARE), 1),
    "deit": Family(
        lambda: hf.DeiTModel(hf.DeiTConfig(**TOWER)),
        hf.DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}, resample=2),
        2,
    ),
    "beit": Family(lambda: hf.BeitModel(hf.BeitConfig(**TOWER)), hf.BeitImageProcessor(**SQUARE), 1),
    "ijepa": Family(
        lambda: hf.IJepaModel(hf.IJepaConfig(**TOWER)), hf.ViTImageProcessor(**SQUARE, rescale_factor=1 / 127.5), 0
    ),
    "pixio": Family(lambda: hf.PixioModel(hf.PixioConfig(**SIZES, image_size=32)), hf.BitImageProcessor(**CROP), 8),
    "siglip, whole": Family(
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=TOWER)),
        hf.SiglipImageProcessor(**SQUARE, resample=2),
        0,
        vision_model,
    ),
    "clip with projection": Family(
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TOWER, projection_dim=8)),
        hf.CLIPImageProcessor(**CROP, do_rescale=True),
        1,
        vision_model,
        head=False,
    ),
    "clip of a llava": Family(llava, hf.CLIPImageProcessor(**CROP), 1, lambda model: model.vision_tower, head=False),
    "aimv2": Family(clip_like("Aimv2"), hf.CLIPImageProcessor(**CROP), 0, vision_model),
    "radio": Family(
        lambda: hf.RadioModel(hf.RadioConfig(**SIZES, image_size=32, max_img_size=64)),
        hf.CLIPImageProcessor(**CROP, do_normalize=False),
        10,
        head=False,
    ),
    "data2vec": Family(
        lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**TOWER)),
        hf.BeitImageProcessor(**SQUARE),
        1,
        head=False,
    ),
    "chinese clip": Family(
        clip_like("ChineseCLIP"), hf.ChineseCLIPImageProcessor(**SQUARE, crop_size=SQUARE["size"]), 1, vision_model
    ),
    "metaclip 2": Family(clip_like("MetaClip2"), hf.CLIPImageProcessor(**CROP), 1, vision_model),
    "eva of blip 2": Family(blip2, hf.BlipImageProcessor(**SQUARE), 1, vision_model),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("towers")

    def directory(name: str) -> Path:
        path = base / name.replace(" ", "-")
        if not path.exists():
            torch.manual_seed(0)
            FAMILIES[name].make().save_pretrained(path)
            FAMILIES[name].processor.save_pretrained(path)
        return path

    return directory


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(io.BytesIO(tiny_models.picture(1, (97, 61)))).convert("RGB")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_equals_its_own_network_on_its_own_pixels(saved, picture, name):
    family, path = FAMILIES[name], saved(name)
    tower = load_tower(str(path), frozen=True)
    pixels = tower.image.pixels(picture)
    theirs = np.asarray(hf.AutoImageProcessor.from_pretrained(path)(picture, return_tensors="pt")["pixel_values"][0])
    levels = np.abs(tower.image.normalised(pixels) - theirs) * np.array(tower.image.std)[:, None, None] * 255
    assert levels.max() <= 3  # Pillow and torchvision round differently
    ours = torch.from_numpy(tower.image.normalised(pixels))[None]
    with torch.no_grad():
        output = family.half(family.make().from_pretrained(path)).eval()(pixel_values=ours)
    views = tower(torch.from_numpy(pixels)[None])
    assert output.last_hidden_state.shape[1] == 16 + family.before == tower.num_patches + family.before
    assert torch.allclose(views.patches, output.last_hidden_state[:, family.before :], atol=1e-5)
    pooled = output.pooler_output if family.head else output.last_hidden_state[:, 0]
    expected = views.patches.mean(dim=1) if pooled is None else pooled
    assert torch.allclose(views.pooled, expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_tower_is_made_again_and_trains_whole(saved, picture, name):
    tower = load_tower(str(saved(name)), frozen=False)
    pixels = torch.from_numpy(tower.image.pixels(picture))[None]
    again = tower_from_config(tower.describe(), tower.image, frozen=True)
    again.load_state_dict(tower.state_dict())
    expected = tower.eval()(pixels)
    assert torch.equal(again(pixels).patches, expected.patches)
    assert torch.equal(again(pixels).pooled, expected.pooled)
    torch.manual_seed(1)  # of DINOv3's positions, which training varies
    views = tower.train()(pixels)
    (views.patches.sum() + views.pooled.square().sum()).backward()
    trained = {key for key, value in tower.model.named_parameters() if value.requires_grad}
    assert {key for key, value in tower.model.named_parameters() if value.grad is not None} == trained
    left_out = {key for key, _ in tower.model.named_parameters()} - trained
    assert left_out == set(FAMILIES[name].unused)
    whole = {key: value.grad for key, value in tower.model.named_parameters() if value.requires_grad}
    tower.zero_grad()
    tower.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    views = tower(pixels)
    (views.patches.sum() + views.pooled.square().sum()).backward()
    for key, value in tower.model.named_parameters():
        assert not value.requires_grad or torch.allclose(value.grad, whole[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_a_checkpoint_for_classification_has_no_pooling_head(tmp_path, picture, name):
    family = FAMILIES[name]
    kind = type(family.make()).__name__.replace("Model", "ForImageClassification")
    torch.manual_seed(0)
    getattr(hf, kind)(family.make().config).save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), frozen=False)
    views = tower(torch.from_numpy(tower.image.pixels(picture))[None])
    states = tower.output(torch.from_numpy(tower.image.pixels(picture))[None]).last_hidden_state
    assert torch.equal(views.pooled, states[:, 0])
    assert all(value.requires_grad for value in tower.parameters())
    again = tower_from_config(tower.describe(), tower.image, frozen=True)
    assert again.state_dict().keys() == tower.state_dict().keys()


def test_a_checkpoint_without_a_mask_token_is_complete(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    path = saved("dinov2")
    weights = load_file(path / "model.safetensors")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((path / file).read_bytes())
    del weights["embeddings.mask_token"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_tower(str(tmp_path), frozen=True).num_patches == 16
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its model's weights .layernorm.weight"):
        load_tower(str(tmp_path), frozen=True)


SIDES = dict(depths=[1, 1], embed_dim=8, num_heads=[1, 1], window_size=2, image_size=32, patch_size=4)
REFUSED = {
    "convnext": (
        lambda: hf.ConvNextModel(hf.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2)),
        "is a convnext, whose configuration has no hidden_size",
    ),
    "swin": (
        lambda: hf.SwinModel(hf.SwinConfig(**SIDES)),
        r"is a swin, whose states .* \(1, 16, 16\), not \(1, 64, 16\)",
    ),
    "videomae": (
        lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**TOWER, num_frames=2)),
        "is a videomae, which does not take one image of 32 x 32",
    ),
    "yolos": (
        lambda: hf.YolosModel(hf.YolosConfig(**TOWER | {"image_size": [32, 32]}, num_detection_tokens=5)),
        r"is a yolos, whose states .* \(1, 22, 24\), not \(1, 16, 24\)",
    ),
    "vit of masked images": (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**TOWER)), "is a vit_mae, whose states"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_encoders_without_states_of_square_patches_are_refused_by_name(tmp_path, name):
    make, message = REFUSED[name]
    make().save_pretrained(tmp_path)
    hf.ViTImageProcessor(**SQUARE).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_tower(str(tmp_path), frozen=True)
    assert "model.vision needs" in str(caught.value)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (hf.ViTImageProcessor(size={"height": 32, "width": 48}), "does not make square images"),
        (hf.ViTImageProcessor(size={"shortest_edge": 32}), "does not make square images"),
        (hf.ViTImageProcessor(**SQUARE, do_resize=False), "do_resize: false"),
        (hf.ViTImageProcessor(size={"height": 48, "width": 48}), "does not take one image of 48 x 48 pixels"),
        (None, "has no preprocessor_config.json"),
    ],
)
def test_image_processors_that_do_not_fit_are_refused(saved, tmp_path, processor, message):
    for file in saved("vit").glob("*.*s*"):
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if processor is not None:
        processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_tower(str(tmp_path), frozen=True)
