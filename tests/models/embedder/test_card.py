"""The model card: front matter that the hub reads, figures of the run, and code that loads the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.card import CardFacts, write_card
from tests.support import tiny_models

FIGURES = {
    "steps": 1200,
    "pairs": 34567,
    "validation_pairs": 890,
    "best_step": 1000,
    "best_recall": 0.43216,
    "learning_rate": 2e-5,
    "final_loss": 1.98766,
}


def card_of(directory: Path, **changes: object) -> ModelCard:
    facts = CardFacts(
        name="notellm2-seed42",
        location="runs/world/embedders/notellm2-seed42/model",
        model=tiny_models.settings(llm="Qwen/Qwen3-0.6B", vision="openai/clip-vit-base-patch16"),
        train=TrainSettings(),
        source="tabular",
        notes=4321,
        figures=FIGURES,
    )
    write_card(directory, facts._replace(**changes))
    return ModelCard.load(directory / "README.md")


def test_the_hub_can_read_what_it_is_and_how_good(tmp_path):
    data = card_of(tmp_path).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert data.base_model == ["Qwen/Qwen3-0.6B", "openai/clip-vit-base-patch16"]
    assert {"sentence-transformers", "notellm2-ray", "multimodal"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("recall_at_10", 0.4322)


def test_it_tells_data_settings_recall_limits_and_licence(tmp_path):
    text = card_of(tmp_path).text
    for told in ("34,567", "890", "4,321", "step 1,000", "2e-05", "**0.4322**", "1.9877", "`Qwen/Qwen3-0.6B`"):
        assert told in text, told
    assert re.findall(r"^## (.+)$", text, re.M) == ["Use", "What it is made of", "Training", "Limits", "Licence"]
    assert not re.search(r"None|\{[a-z]|TODO|More Information Needed", text)


def test_settings_that_differ_from_their_defaults_are_told(tmp_path):
    model = tiny_models.settings(embedding_dim=None, missing_image="zero", prompt_language="en")
    train = TrainSettings(hard_negatives=2, negatives_of="basic", gpus_per_worker=4)
    text = card_of(tmp_path, model=model, train=train).text
    for told in (
        '`missing_image="zero"`',
        "hidden state",
        "`hard_negatives=2`",
        '`negatives_of="basic"`',
        "in English",
    ):
        assert told in text, told
    assert "gpus_per_worker" not in text and "epochs" not in text
    older = {name: value for name, value in FIGURES.items() if name != "learning_rate"}
    assert "| peak learning rate | by the size" in card_of(tmp_path, figures=older).text


def test_models_without_a_name_on_the_hub_are_described(tmp_path):
    own = tiny_models.settings(llm="tiny", vision=str(tmp_path))
    card = card_of(tmp_path, model=own)
    assert card.data.base_model is None
    assert "trained from scratch on the training notes" in card.text and f"`{tmp_path}`" in card.text


def test_an_untrained_or_unvalidated_model_claims_no_recall(tmp_path):
    for changes in ({"train": None, "figures": {"steps": 0}}, {"figures": FIGURES | {"best_recall": None}}):
        card = card_of(tmp_path, **changes)
        assert card.data.eval_results is None
        assert "Its recall was not measured" in card.text


@pytest.mark.parametrize(("variant", "seen"), [("text_only", "title, topics and text"), ("image_only", "image")])
def test_it_names_what_the_variant_sees(tmp_path, variant, seen):
    card = card_of(tmp_path, model=tiny_models.settings(variant))
    assert f"Turns a note ({seen})" in card.text
    assert ("boats in a harbour" in card.text) == ("/v1" in card.text) == (variant == "text_only")
    assert "multimodal" not in card.data.tags


def test_the_code_for_loading_runs(tmp_path):
    llm, clip = tiny_models.save_llm(tmp_path / "llm"), tiny_models.save_clip(tmp_path / "clip")
    model = tmp_path / "model"
    build_encoder(tiny_models.settings(), 1, llm_path=llm, vision_path=clip).save_pretrained(model)
    ours, theirs, service = re.findall(r"```python\n(.*?)```", card_of(model, location=str(model)).text, re.S)
    for code, shape in ((ours, (1, 16)), (theirs, (2, 16))):
        names: dict[str, object] = {}
        exec(code, names)
        assert names["vectors"].shape == shape
    assert "/v1" in service
