"""Actors that can never be placed are an error at once, not an endless wait."""

from __future__ import annotations

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.infer.resources import require_fit


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
