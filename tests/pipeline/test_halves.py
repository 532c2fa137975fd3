"""Both halves at once: each gets half of the machine, prints its tables whole, and survives a failure of the other."""

import pytest

from notellm2_ray.core.errors import OutputError
from notellm2_ray.pipeline import halves
from notellm2_ray.presets import load_settings


def test_each_half_gets_half_of_this_machine_and_all_of_a_cluster(monkeypatch):
    settings = load_settings(None, "demo", ["train.cpus_per_worker=64"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    shared = halves.settings_of_half(settings)
    assert (shared["train"]["cpus_per_worker"], shared["embed"]["cpus_per_actor"]) == (4, 2)
    on_gpu = load_settings(None, "demo", ["train.cpus_per_worker=64", "generation.gpus_per_engine=1"])
    assert not halves.side_by_side(on_gpu)
    assert halves.settings_of_half(on_gpu)["train"]["cpus_per_worker"] == 64
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert halves.side_by_side(on_gpu)
    assert halves.settings_of_half(settings)["train"]["cpus_per_worker"] == 64


@pytest.mark.parametrize("together", [True, False])
def test_a_failed_half_is_named_and_does_not_stop_the_other(monkeypatch, tmp_path, capfd, together):
    monkeypatch.setattr(halves, "side_by_side", lambda settings: together)
    monkeypatch.setattr(halves, "HALVES", ("mine-pairs", "settings"))
    settings = load_settings(None, "demo", [f"workspace={tmp_path}"])
    with pytest.raises(OutputError, match="mine-pairs failed, for the reason given above"):
        halves.run_halves(settings, tmp_path)
    printed = capfd.readouterr()
    assert "run `notellm2 prepare` first" in printed.err
    assert f"workspace: {tmp_path}" in printed.out
