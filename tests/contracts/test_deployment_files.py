"""Files that only Kubernetes and pip read: the KubeRay files and the installer's hook."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from notellm2_ray.cli import main, parser
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.presets import load_settings
from notellm2_ray.serve.haproxy import admission_rules
from tests.support import ROOT

KUBERAY = ROOT / "serve_configs" / "kuberay"


def documents(name):
    return {one["kind"]: one for one in yaml.safe_load_all((KUBERAY / name).read_text())}


def head_of(document):
    spec = document["spec"]
    return (spec.get("rayClusterConfig") or spec["rayClusterSpec"])["headGroupSpec"]


KINDS = {"rayservice.yaml": "RayService", "rayjob.yaml": "RayJob", "rayjob_mqwen.yaml": "RayJob"}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_operator_and_the_submitter_reach_the_dashboard(name, kind):
    head = head_of(documents(name)[kind])
    assert "dashboard-host" not in head["rayStartParams"]
    (container,) = head["template"]["spec"]["containers"]
    ports = {one["name"]: one["containerPort"] for one in container.get("ports", ())}
    wanted = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    assert not ports or wanted.items() <= ports.items()  # without any, KubeRay uses its own


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "RayJob"])
def test_the_network_policy_lets_the_jobs_submitter_in(name):
    submitter = documents(name)["RayJob"]["spec"]["submitterPodTemplate"]
    assert submitter["spec"]["restartPolicy"] == "Never" and submitter["spec"]["containers"][0]["image"]
    rules = documents("rayservice.yaml")["NetworkPolicy"]["spec"]["ingress"]
    to_dashboard = [rule for rule in rules if {"port": 8265} in rule.get("ports", ())]
    (selector,) = to_dashboard[0]["from"]
    assert selector["podSelector"]["matchLabels"].items() <= submitter["metadata"]["labels"].items()


def settings_of(serve_config):
    (application,) = serve_config["applications"]
    return load_settings(None, "demo", application["args"]["overrides"])


def test_every_pod_runs_haproxy_with_the_gateways_admission_rules():
    spec = documents("rayservice.yaml")["RayService"]["spec"]
    served = settings_of(yaml.safe_load(spec["serveConfigV2"])).serve
    groups = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,), (init,) = pod["containers"], pod["initContainers"]
        environment = {one["name"]: one["value"] for one in container["env"]}
        script = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
        mounted = [{one["mountPath"]: one["name"] for one in each["volumeMounts"]} for each in (container, init)]
        (volume,) = {one[str(script.parent)] for one in mounted}
        assert volume in {one["name"] for one in pod["volumes"]}
        options, overrides = parser().parse_known_args(init["command"][1:])
        assert (options.verb, options.directory / "haproxy") == ("haproxy", script)
        own = load_settings(None, "demo", overrides).serve
        assert admission_rules(own) == admission_rules(served) and own.port == served.port


def test_the_autoscaling_file_has_the_rules_of_the_defaults():
    served = settings_of(yaml.safe_load((KUBERAY.parent / "autoscale.yaml").read_text())).serve
    assert admission_rules(served) == admission_rules(ServeSettings()) and served.port == ServeSettings().port


def test_the_script_of_a_cluster_is_written_with_its_variables(tmp_path, capsys):
    main(["haproxy", str(tmp_path), "--preset", "demo", "serve.gateway={max_ongoing: 5, max_queued: 2}"])
    lines = dict(line.removeprefix("export ").split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["RAY_SERVE_ENABLE_HA_PROXY"] == "1" and os.access(lines["RAY_SERVE_HAPROXY_BINARY_PATH"], os.X_OK)
    assert "mul(7)" in (tmp_path / "haproxy.rules").read_text()


FAKE_TORCH = """
made = []
class version: cuda = {cuda!r}
class library:
    class Library:
        def __init__(self, *_): pass
        def define(self, schema): made.append(schema.split("(")[0])
"""


@pytest.mark.parametrize(
    ("cuda", "torchvision", "declared"),
    [(None, "0.28.0", ["nms", "qnms"]), (None, "0.28.0+cpu", []), ("13.0", "0.28.0", [])],
)
def test_the_hook_declares_operators_only_where_torchvision_cannot(tmp_path, cuda, torchvision, declared):
    (tmp_path / "torch.py").write_text(FAKE_TORCH.format(cuda=cuda))
    (tmp_path / "torchvision.py").write_text("")
    about = tmp_path / f"torchvision-{torchvision}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchvision\nVersion: {torchvision}\n")
    script = "import torchvision_cpu_hook, torchvision, torch; print(*torch.made)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "requirements")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.split()) == (0, declared), done.stderr


def test_the_hook_is_installed_if_needed_and_else_removed(tmp_path):
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    install.place_hook(tmp_path, wanted=True)
    assert sorted(os.listdir(tmp_path)) == ["torchvision_cpu_hook.pth", "torchvision_cpu_hook.py"]
    install.place_hook(tmp_path, wanted=False)
    install.place_hook(tmp_path, wanted=False)
    assert os.listdir(tmp_path) == []
