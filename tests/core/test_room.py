"""Room for a job's workers: counted within nodes, and waited for where a cluster may grow."""

import logging

import pytest
import ray
import ray.autoscaler.sdk

from notellm2_ray.core import room
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.train.launch import _require_resources


def test_a_worker_finds_room_within_one_node():
    nodes = [{"CPU": 8, "GPU": 2}, {"CPU": 3, "GPU": 4}, {"CPU": 64}]
    assert room.places(nodes, {"CPU": 2, "GPU": 1}) == 2 + 1
    assert room.places(nodes, {"CPU": 0.5, "GPU": 0.25}) == 8 + 6
    assert room.places(nodes, {"CPU": 8, "GPU": 0}) == 1 + 8


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of one GPU that has, after each look, the next of these numbers of nodes."""
    sizes, requests = [], []

    def nodes():
        count = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}] * count + [{"Alive": False, "Resources": {}}]

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.01)
    return sizes, requests


EIGHT = TrainSettings(num_workers=8, gpus_per_worker=1)


def test_too_few_gpus_are_refused_with_the_settings_to_change(cluster):
    sizes, requests = cluster
    sizes[:] = [2]
    with pytest.raises(ConfigError) as caught:
        _require_resources(EIGHT, embedded=True, section="train", wait_minutes=15)
    for part in ("needs 8 CPUs and 8 GPUs", "train.num_workers=8", "train.gpus_per_worker=1", "room for 2"):
        assert part in str(caught.value)
    assert not requests


def test_a_joined_cluster_is_asked_to_grow_and_refused_if_it_does_not(cluster, caplog):
    sizes, requests = cluster
    sizes[:] = [2]
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match=r"after 0.001 minutes.*tune.num_workers=8"):
        _require_resources(EIGHT, embedded=False, section="tune", wait_minutes=0.001)
    assert "room for 2. Asking for more nodes" in caplog.text
    assert requests == [[{"CPU": 1, "GPU": 1}] * 8, []]


def test_a_joined_cluster_that_grows_in_time_is_used(cluster):
    sizes, requests = cluster
    sizes[:] = [0, 2, 5, 8]
    _require_resources(EIGHT, embedded=False, section="train", wait_minutes=1)
    assert len(requests) == 2


def test_a_cluster_with_room_is_not_asked(cluster):
    sizes, requests = cluster
    sizes[:] = [8]
    _require_resources(EIGHT, embedded=False, section="train", wait_minutes=15)
    assert not requests
