"""What a service is given when it joins a cluster that runs already."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from notellm2_ray.core import cluster
from notellm2_ray.core.settings import RaySettings
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.serve import launch
from tests.support.serving import Service, free_port, make_world

THERE = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT")


class JoinedError(Exception):
    """Raised in place of joining Ray, with the variables for the cluster."""


@pytest.fixture
def joined(tmp_path, monkeypatch):
    """The variables that the cluster's processes are given."""
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "10.0.0.1:6379"})
    spec = SimpleNamespace(serve=ServeSettings(), keys_file=tmp_path / "keys", directory=tmp_path)

    def connect(environment=None):
        raise JoinedError(environment)

    with pytest.raises(JoinedError) as raised:
        launch.start(spec, connect)
    return raised.value.args[0]


def test_variables_are_for_the_processes_of_the_cluster(joined, tmp_path):
    assert all(joined[name] for name in THERE)
    script = Path(joined["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert script.is_relative_to(tmp_path) and os.access(script, os.X_OK)  # on the storage that all nodes mount
    assert script.with_suffix(".rules").read_text().count("nl2_full")
    local = [joined[f"RAY_SERVE_HAPROXY_{name}"] for name in ("SOCKET_PATH", "CONFIG_FILE_LOC", "METRICS_SOCKET_PATH")]
    assert not any(Path(one).is_relative_to(tmp_path) or len(one) > 107 - 57 for one in local)


def test_a_job_hands_variables_to_a_cluster_that_it_joins(monkeypatch):
    given = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.append(options))
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "10.0.0.1:6379"})
    cluster.connect(RaySettings(), {"A": "1"})
    assert given[0]["runtime_env"] == {"env_vars": {"A": "1"}}


CLUSTER = """
import ray
started = ray.init(address="local", num_cpus=8, object_store_memory=2 * 10**8, include_dashboard=False)
print("at", started.address_info["gcs_address"], flush=True)
input()
"""


@pytest.mark.slow
def test_a_service_in_a_running_cluster_has_haproxy_with_its_rules(tmp_path):
    world, port = make_world(tmp_path / "world"), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            address = next(line for line in other.stdout if line.startswith("at ")).split()[1]
            ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
            service = Service(world.spec("service", port=port), tmp_path, {"RAY_ADDRESS": address, **ports})
            try:
                assert service.http.get("/v1/ready").status_code == 200
                (config,) = Path(tempfile.gettempdir()).glob(f"nl2-{port}/*/haproxy.cfg")
                assert "nl2_full" in config.read_text() and config.parent.stat().st_mode & 0o077 == 0
            finally:
                service.stop()
        finally:
            other.communicate("\n", timeout=60)


@pytest.mark.parametrize(("running", "ended"), [(["notellm2"], ["all"]), (["notellm2", "others"], ["notellm2"])])
def test_other_applications_of_the_cluster_go_on(monkeypatch, running, ended):
    from ray import serve

    done = []
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(running)))
    monkeypatch.setattr(serve, "shutdown", lambda: done.append("all"))
    monkeypatch.setattr(serve, "delete", done.append)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    launch.shut_down("notellm2")
    assert done == ended
