"""The pool of engines in a cluster that grows: it begins with the first engine, and others join or are replaced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.infer import preference_pool
from notellm2_ray.infer.model_facts import ModelFacts
from notellm2_ray.infer.preference_pool import EnginePool
from notellm2_ray.infer.preference_worker import ChainCounts, PreferenceJob


class Cluster:
    """Actors whose calls end when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: dict[str, Any] = {}  # of references
        self.calls: list[str] = []
        self.number = 0
        monkeypatch.setattr(EnginePool, "_new", lambda _: self.actor())
        monkeypatch.setattr(ray, "wait", lambda refs, **_: ([one for one in refs if one in self.results][:1], []))
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "kill", lambda _: None)

    def actor(self) -> Any:
        name, self.number = f"actor{self.number}", self.number + 1

        def remote(method: str) -> Any:
            def call(*_: Any) -> str:
                self.calls.append(f"{name}.{method}{sum(one.startswith(f'{name}.{method}') for one in self.calls)}")
                return self.calls[-1]

            return SimpleNamespace(remote=call)

        return SimpleNamespace(**{method: remote(method) for method in ("start", "run", "stop")})

    def get(self, reference: str) -> Any:
        if isinstance(self.results[reference], Exception):
            raise self.results[reference]
        return self.results[reference]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def pool(engines: int) -> EnginePool:
    facts = ModelFacts("m", "Qwen2ForCausalLM", False, None, "f")
    job: Any = PreferenceJob(facts, None, PreferenceSettings(), GenerationSettings(engines=engines), "en", 1)
    return EnginePool(job)


DONE = ChainCounts(1, 1, 1)


def test_work_begins_with_the_first_engine_and_later_ones_join(cluster: Cluster) -> None:
    cluster.results["actor1.start0"] = None
    with pool(3) as engines:
        assert engines.room() == 8
        engines.submit(["a"])
        assert cluster.calls[-1] == "actor1.run0"
        cluster.results |= {"actor1.run0": DONE}
        assert list(engines.finished()) == [(["a"], DONE)]
        cluster.results["actor2.start0"] = None
        engines.submit(["b"])
        assert list(engines.finished()) == []  # an engine has joined
        engines.submit(["c"])
        assert cluster.calls[-2:] == ["actor1.run1", "actor2.run0"]


def test_a_dead_engine_gets_no_chains_until_its_successor_is_ready(cluster: Cluster) -> None:
    cluster.results["actor0.start0"] = None
    with pool(1) as engines:
        engines.submit(["a"])
        cluster.results["actor0.run0"] = RayActorError()
        assert list(engines.finished()) == [(["a"], None)]
        assert engines.room() == 0 and cluster.calls[-1] == "actor1.start0"
        cluster.results["actor1.start0"] = None
        list(engines.finished())
        assert engines.room() == 8


def test_a_model_that_ends_every_engine_is_an_error(cluster: Cluster) -> None:
    cluster.results["actor0.start0"] = RayActorError()
    with pytest.raises(ModelError, match="did not start"), pool(1):
        pass
    cluster.results = {f"actor{number}.start0": RayActorError() for number in range(2, 99)} | {"actor1.start0": None}
    with pytest.raises(ModelError, match=r"engines died 4 times"), pool(1) as engines:
        engines.submit(["a"])
        cluster.results["actor1.run0"] = RayActorError()
        for _ in range(9):
            list(engines.finished())


def test_waiting_for_the_first_engine_ends_only_with_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter(range(3))

    def wait(references: list[str], **_: Any) -> Any:
        return (references[-1:], []) if next(rounds, None) is None else ([], references)

    monkeypatch.setattr(ray, "wait", wait)
    cluster.results["actor1.start0"] = None
    with pool(2) as engines:
        assert engines._loads() == {1: 0}
    assert preference_pool._POLL_SECONDS <= 1
