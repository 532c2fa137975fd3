"""Actors that can never be placed are an error at once, not an endless wait."""

from __future__ import annotations

import pytest
import ray

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import EmbedSettings, GenerationSettings
from notellm2_ray.infer import resources
from notellm2_ray.infer.resources import check_engines, check_resources, require_fit


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "actors", "names"),
    [
        ([{"CPU": 4}], 2, 0, 3, r"CPU.*enough for 2.*embed\.actors or embed\.cpus_per_actor"),
        ([{"CPU": 4}], 8, 0, 1, r"embed\.cpus_per_actor"),
        ([{"CPU": 64}], 1, 1, 1, r"GPU.*embed\.gpus_per_actor"),
        ([{"CPU": 3}, {"CPU": 3}], 2, 0, 3, "enough for 2"),  # 6 CPUs, but an actor does not span nodes
        ([{"CPU": 64}, {"CPU": 1, "GPU": 4}], 2, 1, 1, "on one node"),
    ],
)
def test_what_does_not_fit_is_named(nodes: list, cpus: float, gpus: float, actors: int, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        require_fit(nodes, {"CPU": cpus, "GPU": gpus}, actors)


def test_what_fits_passes() -> None:
    require_fit([{"CPU": 4}], {"CPU": 0.1, "GPU": 0}, 40)
    require_fit([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], {"CPU": 2, "GPU": 0.5}, 4)


def test_a_share_of_a_gpu_lies_on_one_gpu() -> None:
    require_fit([{"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 0.4}, 4)
    with pytest.raises(ConfigError, match=r"enough for 2\..*embed\.gpus_per_actor"):
        require_fit([{"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 0.6}, 3)


class FakeCluster:
    """Nodes with the given resources, all of them free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], *, started_here: bool) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        free = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "available_resources", lambda: free)
        monkeypatch.setattr(resources, "started_here", lambda: started_here)


@pytest.mark.parametrize(
    ("nodes", "changes"),
    [
        ([{"CPU": 8}], {"gpus_per_engine": 1}),  # the GPU nodes have not come yet
        ([{"CPU": 8, "GPU": 1}], {"gpus_per_engine": 1, "engines": 4}),
        ([{"CPU": 2}], {"cpus_per_engine": 2}),  # nothing is left for reading
    ],
)
def test_a_cluster_that_may_grow_is_waited_for(monkeypatch, caplog, nodes, changes) -> None:
    settings = GenerationSettings(**changes)
    FakeCluster(monkeypatch, nodes, started_here=False)
    with caplog.at_level("WARNING", "notellm2_ray"):
        check_engines("stage", settings, beside=0.5)
    assert "Waiting for the cluster to grow" in caplog.text and "generation." in caplog.text
    FakeCluster(monkeypatch, nodes, started_here=True)
    with pytest.raises(ConfigError, match=r"generation\."):
        check_engines("stage", settings, beside=0.5)


def test_encoders_wait_too(monkeypatch, caplog) -> None:
    FakeCluster(monkeypatch, [{"CPU": 8}], started_here=False)
    with caplog.at_level("WARNING", "notellm2_ray"):
        check_resources(2, EmbedSettings(gpus_per_actor=1))
    assert "embed.gpus_per_actor" in caplog.text
