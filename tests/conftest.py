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
    """What needs a Ray cluster is slow; what drives a whole service runs alone, since it is about answers in time.

    What changes the shared service comes after its other tests, by its mark.
    """
    for item in items:
        needed = getattr(item, "fixturenames", ())
        if "ray_cluster" in needed:
            item.add_marker(pytest.mark.slow)
        if {"service", "start"} & set(needed):
            item.add_marker(pytest.mark.alone)
    using = [item for item in items if "service" in getattr(item, "fixturenames", ()) and _has_no_own_service(item)]
    late = sorted((item for item in using if _place(item)), key=_place)
    if late:
        last = max((items.index(item) for item in using if not _place(item)), default=len(items) - 1)
        items[:] = [
            *(item for item in items[: last + 1] if not _place(item)),
            *late,
            *(item for item in items[last + 1 :] if not _place(item)),
        ]


def _has_no_own_service(item: pytest.Item) -> bool:
    return not hasattr(getattr(item, "module", None), "service")


def _place(item: pytest.Item) -> int:
    """The place among the tests that change the shared service; 0 for other tests."""
    mark = item.get_closest_marker("late")
    return 0 if mark is None else mark.args[0]


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


@pytest.fixture(scope="session")
def service(world, tmp_path_factory: pytest.TempPathFactory):
    """The running service that most tests share, with all its parts: two gateways, keys, stand-ins of engines, arms.

    Starting one takes half a minute. ``key`` and ``reading`` are its keys; ``http`` has the first. Tests delete the
    notes that they write; those that kill replicas, swap the model or stop it are marked ``late``.
    """
    from notellm2_ray.serve.keys import create_key
    from tests.support import engines
    from tests.support.serving import SMALL, Service

    path = tmp_path_factory.mktemp("keys") / "keys.json"
    reading, key = create_key(path, "page", ["read"]), create_key(path, "platform", ["read", "write"])
    arms = [{"name": "ranked", "share": 0.5}, {"name": "recalled", "share": 0.5, "use_ranker": False}]
    spec = world.spec(
        "workspace/serving",
        auth="on",
        keys_file=path,
        arms=arms,
        limits={"body_bytes": 200_000, "notes": 8},
        gateway=SMALL.model_copy(update={"replicas": 2}),
        ranker=SMALL,
        preferences=SMALL,
        spec_ranker_engine=engines.make_ranker,
        spec_preference_engine=engines.make_preferences,
    )
    made = Service(spec, tmp_path_factory.mktemp("service"))
    made.key, made.reading = key, reading
    made.http.headers["authorization"] = f"Bearer {key}"
    yield made
    made.stop()


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
