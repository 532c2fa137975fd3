"""Image processors' files as they are published, with the format that they describe."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from transformers import ViTConfig

from notellm2_ray.models.vision.pixels import CLIP_MEAN, CLIP_STD, ImageSettings, from_processor
from notellm2_ray.models.vision.processors import load_image_settings

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = {"image_mean": HALF, "image_std": HALF}
IMAGENET = {"image_mean": MEAN, "image_std": STD}

PUBLISHED = {
    "openai/clip-vit-base-patch16": (
        {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224}
        | {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        ImageSettings(224),
    ),
    "google/vit-base-patch16-224": (
        {"do_normalize": True, "do_resize": True, "image_processor_type": "ViTImageProcessor", "size": 224, **HALVES},
        ImageSettings(224, HALF, HALF, "squash", 224, 2),
    ),
    "facebook/dinov2-base": (
        {"do_center_crop": True, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}
        | IMAGENET
        | {"crop_size": {"height": 224, "width": 224}, "resample": 3, "rescale_factor": 0.00392156862745098},
        ImageSettings(224, MEAN, STD, "shortest", 256),
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        {"crop_size": None, "do_center_crop": None, "image_processor_type": "DINOv3ViTImageProcessorFast", **IMAGENET}
        | {"size": {"height": 224, "width": 224}, "resample": 2, "device": None, "data_format": "channels_first"},
        ImageSettings(224, MEAN, STD, "squash", 224, 2),
    ),
    "google/siglip2-base-patch16-256": (
        {"do_convert_rgb": None, "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"}
        | {"resample": 2, "size": {"height": 256, "width": 256}, **HALVES},
        ImageSettings(256, HALF, HALF, "squash", 256, 2),
    ),
    "facebook/deit-base-distilled-patch16-224": (
        {"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor", "size": 256}
        | {"resample": 3, **IMAGENET},
        ImageSettings(224, MEAN, STD, "squash", 256, 3),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_with_the_defaults_of_their_classes(tmp_path, name):
    values, expected = PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    found = load_image_settings(str(tmp_path), ViTConfig())
    assert found == dataclasses.replace(expected, mean=found.mean, std=found.std)
    assert np.allclose(found.mean + found.std, expected.mean + expected.std)
    found.save(tmp_path)
    assert from_processor(json.loads((tmp_path / "preprocessor_config.json").read_text()), None, "here") == found
