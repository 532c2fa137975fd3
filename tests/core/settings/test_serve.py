"""Setting one knob of a deployment keeps the service's defaults of its others."""

from notellm2_ray.cli import knobs
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.presets import load_settings


def test_one_knob_of_a_deployment_changes_no_other():
    plain = ServeSettings()
    changed = load_settings(None, None, ["serve.gateway.cpus=0.2", "serve.encoder.max_queued=7"]).serve
    assert changed.gateway == plain.gateway.model_copy(update={"cpus": 0.2})
    assert changed.encoder == plain.encoder.model_copy(update={"max_queued": 7})


def test_help_shows_the_defaults_that_hold():
    text = knobs(("serve",))
    assert f"serve.gateway.max_queued = {ServeSettings().gateway.max_queued}\n" in text
    assert "serve.ranker = null\n" in text
