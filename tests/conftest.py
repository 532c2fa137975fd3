"""Fixtures shared by all tests: one Ray for the whole run, small models and worlds, real data where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import ROOT

# Networks here are so small that threads of OpenMP, which spin while they wait for each other, only cost: beside other
# processes on two cores, training took up to twenty times as long. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a Ray cluster is slow."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ray_cluster():
    """The one embedded Ray cluster of this test run."""
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.core.settings import RaySettings

    ray = connect(RaySettings(num_cpus=4, object_store_gb=0.5))
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random tiny NoteEncoder: ``.path`` its directory, ``.encoder`` itself as read back from there."""
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from tests.support import tiny_models

    base = tmp_path_factory.mktemp("embedder")
    paths = {"llm_path": tiny_models.save_llm(base / "llm"), "vision_path": tiny_models.save_clip(base / "clip")}
    build_encoder(tiny_models.settings(), 0, **paths).save_pretrained(base / "model")
    return SimpleNamespace(path=base / "model", encoder=NoteEncoder.from_pretrained(base / "model"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):
    """See :class:`tests.support.serving.World`."""
    from tests.support.serving import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """A function from a plan to a :class:`tests.support.serving.Service` that runs it; all stop with the module."""
    from tests.support.serving import Service

    services: list[Service] = []

    def start(plan):
        services.append(Service(plan, tmp_path_factory.mktemp("service")))
        return services[-1]

    yield start
    for service in services:
        service.stop()
