"""Every YAML file and preset asks for no more than the machines that it is for have: GPUs, CPUs and memory of pods.

A file that asks for more would wait for ever, which only a cluster would show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import pytest
import yaml

from notellm2_ray.core.room import places
from notellm2_ray.core.settings import Settings
from notellm2_ray.presets import PRESETS, load_settings
from notellm2_ray.serve.spec import common_options
from tests.support import ROOT

Node = Mapping[str, float]
LAPTOP = [{"CPU": 4}]  # logical CPUs of the smallest cluster that a job starts for itself
ONE_GPU = [{"CPU": 8, "GPU": 1}]
EIGHT_GPUS = [{"CPU": 64, "GPU": 8}]
MACHINES = {
    "jobs/configs/microlens.yaml": LAPTOP,
    "jobs/configs/movielens.yaml": LAPTOP,
    "jobs/configs/mqwen_base.yaml": EIGHT_GPUS,
    "jobs/configs/tables.yaml": LAPTOP,
    "jobs/configs/tables_gpu.yaml": ONE_GPU,
    "jobs/configs/world.yaml": LAPTOP,
    "serve_configs/local_cpu.yaml": [{"CPU": 2}],
    "serve_configs/one_gpu.yaml": ONE_GPU,
    "serve_configs/autoscale.yaml": None,  # the cluster of rayservice.yaml, but larger
    "serve_configs/kuberay/rayservice.yaml": None,  # they describe clusters of their own
    "serve_configs/kuberay/rayjob.yaml": None,
    "serve_configs/kuberay/rayjob_mqwen.yaml": None,
}
SETTINGS = {"rayjob.yaml": "tables_gpu.yaml", "rayjob_mqwen.yaml": "mqwen_base.yaml"}
GIB = {"Gi": 1.0, "Mi": 2.0**-10}


def test_every_file_is_checked():
    found = {str(path.relative_to(ROOT)) for top in ("jobs", "serve_configs") for path in (ROOT / top).rglob("*.yaml")}
    assert found == MACHINES.keys(), "add the file to MACHINES, with the machine that it is for"


# --- bulk jobs --------------------------------------------------------------------------------------------------------


def recall(settings: Settings) -> dict[str, tuple[int, Node]]:
    """How many workers each step of recall asks for, and what each of them reserves."""
    train, embed = settings.train, settings.embed
    return {
        "train": (train.num_workers, {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}),
        "embed": (embed.actors, {"CPU": embed.cpus_per_actor, "GPU": embed.gpus_per_actor}),
    }


def ranking(settings: Settings) -> dict[str, tuple[int, Node]]:
    engine, tune = settings.generation, settings.tune
    return {
        "tune": (tune.num_workers, {"CPU": tune.cpus_per_worker, "GPU": tune.gpus_per_worker}),
        "engines": (engine.engines, {"CPU": engine.cpus_per_engine, "GPU": engine.gpus_per_engine}),
    }


REQUIRED = {"movielens": ["source.directory=d"], "microlens": ["source.pairs=p", "source.titles=t"]}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit(name):
    nodes = EIGHT_GPUS if name.startswith(("mqwen", "mtomato")) else LAPTOP
    check_steps(load_settings(None, name, REQUIRED.get(name, [])), nodes)


@pytest.mark.parametrize("name", [name for name in MACHINES if name.startswith("jobs/")])
def test_settings_of_jobs_fit(name):
    values = yaml.safe_load((ROOT / name).read_text())
    check_steps(load_settings(str(ROOT / name), None, REQUIRED.get(values.get("preset"), [])), MACHINES[name])


def check_steps(settings: Settings, nodes: Sequence[Node]) -> None:
    for step, (count, each) in {**recall(settings), **ranking(settings)}.items():
        assert count <= places(nodes, each), f"{step} asks for {count} times {each}"


@pytest.mark.parametrize("name", SETTINGS)
def test_jobs_fit_their_clusters(name):
    job = manifest(name)["RayJob"]["spec"]
    spec = job["rayClusterSpec"]
    settings = load_settings(str(ROOT / "jobs/configs" / SETTINGS[name]), None, [])
    nodes = pods(spec, "replicas")
    steps = [recall(settings), ranking(settings)] if " run --" in job["entrypoint"] else [recall(settings)]
    check_steps(settings, nodes)
    for first in steps[0].values():  # in a cluster both halves run at the same time
        for second in steps[-1].values() if len(steps) > 1 else [(0, {"CPU": 1})]:
            assert pack([first, second], nodes), f"{first} beside {second}"


# --- services ---------------------------------------------------------------------------------------------------------


def deployments(settings: Settings, *, most: bool) -> list[tuple[int, Node]]:
    serve = settings.serve.with_engine_gpus(settings.generation.gpus_per_engine)
    scaled = [one for one in (serve.gateway, serve.encoder, serve.preferences, serve.ranker) if one is not None]
    found: list[tuple[int, Node]] = [
        (one.most_replicas if most else one.replicas, {"CPU": one.cpus, "GPU": one.gpus or 0}) for one in scaled
    ]
    for cpus in (serve.writer_cpus, serve.users_cpus):
        actor = common_options(cpus, drain_seconds=1, resource=serve.state_resource)["ray_actor_options"]
        found.append((1, {"CPU": actor["num_cpus"], **actor.get("resources", {})}))
    return found


def service(values: Mapping[str, object]) -> Settings:
    (application,) = values["applications"]
    given = application["args"]
    return load_settings(None, given.get("preset"), given["overrides"])


@pytest.mark.parametrize("name", ["local_cpu.yaml", "one_gpu.yaml"])
def test_services_of_one_machine_fit(name):
    settings = service(yaml.safe_load((ROOT / "serve_configs" / name).read_text()))
    assert pack(deployments(settings, most=True), MACHINES[f"serve_configs/{name}"])


def test_the_service_fits_its_cluster_at_its_smallest_and_at_its_largest():
    spec = manifest("rayservice.yaml")["RayService"]["spec"]
    settings = service(yaml.safe_load(spec["serveConfigV2"]))
    cluster = spec["rayClusterConfig"]
    assert pack(deployments(settings, most=False), pods(cluster, "minReplicas"))
    assert pack(deployments(settings, most=True), pods(cluster, "maxReplicas"))
    assert not pack(deployments(settings, most=True), pods(cluster, "minReplicas"))  # else it would not need to grow


def test_nothing_takes_the_place_of_the_writer():
    spec = manifest("rayservice.yaml")["RayService"]["spec"]
    (state,) = [one for one in pods(spec["rayClusterConfig"], "maxReplicas") if "state" in one]
    for _, each in deployments(service(yaml.safe_load(spec["serveConfigV2"])), most=True):
        assert "state" in each or not places([state], each)


def test_each_replica_of_the_larger_service_fits_a_pod():
    settings = service(yaml.safe_load((ROOT / "serve_configs/autoscale.yaml").read_text()))
    nodes = pods(manifest("rayservice.yaml")["RayService"]["spec"]["rayClusterConfig"], "minReplicas")
    assert all(places(nodes, each) for _, each in deployments(settings, most=True))


# --- clusters ---------------------------------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "serve_configs/kuberay" / name).read_text())}


def pods(spec: Mapping, number: str) -> list[Node]:
    """Ray's view of the nodes of a cluster, with their memory in GiB."""
    nodes = [node(spec["headGroupSpec"])]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        nodes += [node(group)] * group[number]
    return nodes


def node(group: Mapping) -> Node:
    (container,) = group["template"]["spec"]["containers"]
    limits, start = container["resources"]["limits"], group["rayStartParams"]
    own = json.loads(json.loads(start["resources"])) if "resources" in start else {}  # a shell's string, quoted twice
    return {
        "CPU": float(start.get("num-cpus", limits["cpu"])),
        "GPU": float(limits.get("nvidia.com/gpu", 0)),
        "memory": float(limits["memory"][:-2]) * GIB[limits["memory"][-2:]],
        **own,
    }


def pack(asked: Iterable[tuple[int, Node]], nodes: Iterable[Node]) -> bool:
    """Whether all find room: special ones and those with GPUs first, each on the node with the least room left."""
    free = [dict(one) for one in nodes]
    each = [needed for count, needed in asked for _ in range(count)]
    for needed in sorted(
        each, key=lambda one: (-len(one.keys() - {"CPU", "GPU"}), -one.get("GPU", 0), -one.get("CPU", 0))
    ):
        fitting = [one for one in free if all(one.get(name, 0) >= amount - 1e-6 for name, amount in needed.items())]
        if not fitting:
            return False
        taken = min(fitting, key=lambda one: (one.get("GPU", 0), one.get("CPU", math.inf)))
        for name, amount in needed.items():
            taken[name] = taken.get(name, 0) - amount
    return True
