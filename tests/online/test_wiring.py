"""The service's spec, from the settings and the outputs in a workspace."""

from __future__ import annotations

import pytest

from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.online import wiring as online
from notellm2_ray.presets import load_settings
from notellm2_ray.serve.deployments.loaded_model import LoadedModel, Workers
from notellm2_ray.serve.figures import Figures
from tests.support.live_notes import make_table


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
    made = ["model.llm=tiny", "model.vision=tiny", f"workspace={tmp_path}"]
    settings = load_settings("jobs/configs/tables_gpu.yaml", None, made)
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    spec = online.service_spec(settings)
    assert spec.precision == settings.embed.precision == "bf16"
    served = LoadedModel(embedder.path, "cpu", Workers(spec.serve.encode, spec.precision, Figures("test")))
    embedded = NoteEncoder.from_pretrained(embedder.path, precision=settings.embed.precision)
    assert served.fingerprint == embedded.fingerprint != embedder.encoder.fingerprint


def test_preferences_that_cannot_be_advanced_block_by_block_are_refused(tmp_path):
    values = [f"workspace={tmp_path}", "serve.preferences={cpus: 1}", "preferences.variant=direct"]
    settings = load_settings(None, "demo", values)
    (tmp_path / "embedders" / settings.embedder_name / "model").mkdir(parents=True)
    make_table(tmp_path / "serving" / "live.lance")
    with pytest.raises(ConfigError, match=r"preferences\.variant=direct.*recurrent"):
        online.service_spec(settings)
