"""Frozen features of notes, of any tower and any causal LM; random weights never stand in for missing ones."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from notellm2_ray.baselines.ranking.sequential.features import image_features, text_features
from notellm2_ray.core.errors import DataError, ModelError
from tests.support.tiny_models import picture, save_clip, save_llm


def test_images_have_their_towers_pooled_vector_and_unreadable_ones_none(tmp_path):
    images = [("a", picture(1)), ("none", None), ("b", picture(2)), ("broken", b"no image"), ("a again", picture(1))]
    found = image_features(iter(images), save_clip(tmp_path), batch_size=2)
    assert found.ids == ["a", "b", "a again"]
    assert found.matrix.shape == (3, 24)
    np.testing.assert_allclose(found.matrix[0], found.matrix[2], atol=1e-5)
    assert not np.allclose(found.matrix[0], found.matrix[1], atol=1e-3)
    with pytest.raises(DataError, match="readable image"):
        image_features([("x", None)], str(tmp_path))


def test_vgg19_without_its_weights_is_an_error(tmp_path, monkeypatch):
    def nothing(*_):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", nothing)
    with pytest.raises(ModelError, match=r"weights of vgg19 are not available \(no network\): download"):
        image_features([("a", picture(1))], "vgg19")
    (tmp_path / "damaged").write_bytes(b"something else")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "damaged"))
    with pytest.raises(ModelError, match="weights of vgg19 are not available"):
        image_features([("a", picture(1))], "vgg19")
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "other"))
    with pytest.raises(ModelError, match="not those of vgg19"):
        image_features([("a", picture(1))], "vgg19")


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_texts_vector_is_the_mean_over_its_own_tokens(tmp_path, kind):
    path = save_llm(tmp_path, kind)
    texts = {"long": "a small green house by sea " * 3, "empty": "", "short": "red cat", "mark": "<|endoftext|> red"}
    together = text_features(texts, path)
    assert sorted(together.ids) == ["long", "mark", "short"]
    for name, vector in zip(together.ids, together.matrix, strict=True):
        alone = text_features({name: texts[name]}, path)
        np.testing.assert_allclose(alone.matrix[0], vector, atol=1e-5)
    with pytest.raises(DataError, match="image summary"):
        text_features({"x": ""}, path)
    with pytest.raises(ModelError, match="not a model directory"):
        text_features({"x": "y"}, str(tmp_path.parent))
