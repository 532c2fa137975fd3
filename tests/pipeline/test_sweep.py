"""Sweeps through Ray Tune: every value is tried once, and the parent's outputs are shared but not changed."""

import json
from pathlib import Path

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.evaluate.ranking.plots import sweep_plot
from notellm2_ray.evaluate.ranking.tables import sweep_table
from notellm2_ray.pipeline.sweep import SWEEPS, figures_of, overrides, run_sweep, trial_workspace


def make_trial():
    """Inside a function, so that it pickles by value: Ray's workers cannot import a test module."""

    def run_trial(changed, home: Path):
        import ray

        (size,) = changed.values()
        if size == 5:
            raise ValueError("nothing to summarise")
        assert (home / "prepared" / "manifest.json").is_file()
        # The stages reserve their own resources.
        assert ray.get(ray.remote(num_cpus=1)(lambda: "an engine's work").remote(), timeout=30)
        return {"auc": 0.8 - 0.01 * abs(3 - size), "mrr@5": 0.6}

    return run_trial


def parent(tmp_path) -> Path:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.slow
def test_every_value_is_a_trial_and_a_failed_trial_does_not_stop_others(tmp_path, ray_cluster):
    found = run_sweep(SWEEPS["block_size"], make_trial(), parent(tmp_path), values=[5, 3, 1])
    assert [point["value"] for point in found["points"]] == [5, 3, 1]
    assert [point["metrics"].get("auc") for point in found["points"]] == [None, 0.8, pytest.approx(0.78)]
    assert "nothing to summarise" in found["points"][0]["error"]
    assert json.loads((tmp_path / "sweeps" / "block_size" / "sweep.json").read_text()) == found
    assert "80.00" in str(sweep_table(found))
    assert sweep_plot(found, tmp_path).is_file()


def test_a_trial_shares_outputs_that_do_not_depend_on_its_setting(tmp_path):
    sweep = SWEEPS["context_length"]
    home = trial_workspace(parent(tmp_path), sweep, 64)
    assert trial_workspace(tmp_path, sweep, 64) == home
    assert (home / "prepared").is_symlink()
    assert not (home / "image_summaries").exists()
    assert overrides(sweep, 64) == {"ranker.max_preference_tokens": 64, "preferences.max_tokens": 64}


def test_values_must_differ(tmp_path):
    with pytest.raises(ConfigError, match="different values"):
        run_sweep(SWEEPS["block_size"], make_trial(), tmp_path, values=[1, 1])


def test_the_figures_are_the_rankers_under_the_first_protocol():
    row = {"method": "mllm_msr", "figures": {"all": {"auc": {"mean": 0.8}, "mrr@5": {"mean": 0.6}}}}
    results = {"protocols": {"uniform": {"rows": [row]}, "popular": {"rows": []}}}
    assert figures_of(results, "mllm_msr") == {"auc": 0.8, "mrr@5": 0.6}


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
def test_every_swept_setting_exists(sweep):
    from notellm2_ray.core.settings import Settings

    for name in overrides(sweep, 1):
        section, field = name.split(".")
        assert field in type(getattr(Settings(), section)).model_fields
