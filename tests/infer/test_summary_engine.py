"""The actor that describes images, with a fake engine in place of vLLM's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest

from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer import summary_engine as module
from notellm2_ray.infer.model_facts import ModelFacts


@pytest.mark.slow  # Ray's stage is imported
@pytest.mark.parametrize("gpus", [0, 0.5])
def test_an_engine_starts_alone_on_its_gpu(monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    from ray.llm._internal.batch.stages import vllm_engine_stage

    ledger: list[Any] = []

    @contextmanager
    def only_start() -> Any:
        ledger.append("begin")
        yield
        ledger.append("end")

    def start(_: Any, **arguments: Any) -> None:
        ledger.append(arguments)

    monkeypatch.setattr(module, "only_start", only_start)
    monkeypatch.setattr(module, "arguments_on_card", lambda *given, offline: {**given[2], "cache": offline})
    monkeypatch.setattr(vllm_engine_stage.vLLMEngineStageUDF, "__init__", start)
    facts = ModelFacts("m", "Qwen2VLForConditionalGeneration", True, None, "f")
    module.summary_engine(facts, GenerationSettings(gpus_per_engine=gpus))(engine_kwargs={"a": 1}, model="m")
    started = {"engine_kwargs": {"a": 1, **({"cache": True} if gpus else {})}, "model": "m"}
    assert ledger == (["begin", started, "end"] if gpus else [started])
