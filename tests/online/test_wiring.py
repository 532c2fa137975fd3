"""The service's spec, from the settings and the outputs in a workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

import notellm2_ray
from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.core.settings.serve import EncodeSettings
from notellm2_ray.infer.engine import engine_arguments
from notellm2_ray.infer.model_facts import check_model
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.online import wiring as online
from notellm2_ray.presets import load_settings
from notellm2_ray.serve import launch
from notellm2_ray.serve.deployments.loaded_model import LoadedModel, Workers
from notellm2_ray.serve.figures import Figures
from tests.support.live_notes import make_table

PACKAGED = Path(notellm2_ray.__file__).parent / "models" / "checkpoints" / "mllm"


@pytest.fixture
def settings(tmp_path):
    """Settings of a workspace with an embedder but without vectors."""
    settings = load_settings(None, "demo", [f"workspace={tmp_path}"])
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    return settings


def test_without_vectors_or_a_live_table_there_is_nothing_to_serve(settings, tmp_path):
    online.create_key(settings, "page", ["read"])  # creates the serving directory
    assert (tmp_path / "serving").is_dir()
    with pytest.raises(OutputError, match="run embed-notes first"):
        online.service_spec(settings)
    make_table(tmp_path / "serving" / "live.lance")  # as after the bulk outputs were removed
    assert online.service_spec(settings).directory == tmp_path / "serving"


def test_notes_are_served_in_the_precision_that_they_were_embedded_in(embedder, tmp_path):
    made = ["model.llm=tiny", "model.vision=tiny", f"workspace={tmp_path}", "embed.precision=bf16"]
    settings = load_settings("jobs/configs/tables_gpu.yaml", None, made)
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    spec = online.service_spec(settings)
    assert spec.precision == settings.embed.precision == "bf16"
    served = LoadedModel(embedder.path, "cpu", Workers(spec.serve.encode, spec.precision, Figures("test")))
    embedded = NoteEncoder.from_pretrained(embedder.path, precision=settings.embed.precision)
    assert served.fingerprint == embedded.fingerprint != embedder.encoder.fingerprint


def test_by_default_the_vectors_tell_in_which_precision_notes_are_served(embedder, tmp_path):
    settings = load_settings("jobs/configs/tables_gpu.yaml", None, ["model.llm=tiny", f"workspace={tmp_path}"])
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    workers = Workers(EncodeSettings(), online.service_spec(settings).precision, Figures("test"))
    for precision in ("bf16", "fp32"):
        embedded = NoteEncoder.from_pretrained(embedder.path, precision=precision).fingerprint
        assert LoadedModel(embedder.path, "cpu", workers, embedded).fingerprint == embedded
    others = LoadedModel(embedder.path, "cpu", workers, "another model")
    assert others.fingerprint != "another model"
    assert LoadedModel(embedder.path, "cpu", workers).fingerprint == embedder.encoder.fingerprint


def test_preferences_that_cannot_be_advanced_block_by_block_are_refused(tmp_path):
    values = [f"workspace={tmp_path}", "serve.preferences={cpus: 1}", "preferences.variant=direct"]
    settings = load_settings(None, "demo", values)
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    with pytest.raises(ConfigError, match=r"preferences\.variant=direct.*recurrent"):
        online.service_spec(settings)


README_COMMAND = ["serve.ranker={cpus: 0.5}", "serve.preferences={cpus: 2}", "summaries.model=packaged"]


@pytest.mark.parametrize(
    ("changes", "reserved"),
    [
        ([], (1, 1)),
        (["serve.ranker.gpus=0.6", "serve.preferences.gpus=0.3"], (0.6, 0.3)),
        (["serve.ranker.gpus=0", "generation.gpus_per_engine=0.5"], (0, 0.5)),
    ],
)
def test_an_engine_uses_what_its_replica_reserves(tmp_path, changes, reserved):
    ours = ["model.llm=tiny", "model.vision=tiny", "ranker.model=packaged", "preferences.model=packaged"]
    ours += [f"workspace={tmp_path}", f"serve.ranker_model={PACKAGED}", *README_COMMAND, *changes]
    settings = load_settings("jobs/configs/tables_gpu.yaml", None, ours)
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    spec = online.service_spec(settings)
    parts = (
        (spec.serve.ranker, spec.ranker_engine, "ranker"),
        (spec.serve.preferences, spec.preference_engine, "preferences"),
    )
    for (part, engine, name), gpus in zip(parts, reserved, strict=True):
        model, own = engine.args
        arguments = engine_arguments(check_model(model, images=False), own.generation)
        assert part.gpus == own.generation.gpus_per_engine == gpus
        assert arguments.get("gpu_memory_utilization", 0) == pytest.approx(0.9 * gpus)
        assert ("VLLM_CPU_KVCACHE_SPACE" in spec.environments[name]) == (gpus == 0)
        assert own.generation.cpus_per_engine == part.cpus


@pytest.mark.parametrize(
    ("gpus", "cards", "fits"),
    [
        ((1, 1), 1, False),  # the README's command on tables_gpu.yaml
        ((0.2, 0.4, 0.4), 1, True),
        ((0.6, 0.6, 0.6), 2, False),
        ((2, 0.5, 0.5), 3, True),
        ((), 0, True),
    ],
)
def test_a_service_that_finds_no_gpu_is_refused(gpus, cards, fits):
    assert launch.fit_on_cards(gpus, cards) == fits


@pytest.mark.parametrize("asked", ["serve.ranker={cpus: 1}", "serve.preferences={cpus: 1}"])
def test_prompts_that_cannot_fit_are_refused_before_the_service_starts(tmp_path, asked):
    values = [f"workspace={tmp_path}", asked, "generation.max_model_len=100", f"serve.ranker_model={PACKAGED}"]
    values += ["preferences.model=packaged", "preferences.max_tokens=60"]
    settings = load_settings(None, "demo", values)
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    with pytest.raises(ConfigError, match=r"generation\.max_model_len"):
        online.service_spec(settings)
