"""The actor that describes images, with a fake engine in place of vLLM's."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import Any

import pytest

from notellm2_ray.core.settings import GenerationSettings, SummarySettings
from notellm2_ray.infer import summary_engine as module
from notellm2_ray.infer.model_facts import ModelFacts
from notellm2_ray.infer.summary_rows import ASKED, ERROR, Asking

ASKING = Asking([1], SummarySettings(max_tokens=10), [])


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
    module.summary_engine(facts, GenerationSettings(gpus_per_engine=gpus), ASKING)(engine_kwargs={"a": 1}, model="m")
    started = {"engine_kwargs": {"a": 1, **({"cache": True} if gpus else {})}, "model": "m"}
    assert ledger == (["begin", started, "end"] if gpus else [started])


@pytest.mark.slow  # Ray's stage is imported
def test_a_second_answer_comes_from_the_same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.llm._internal.batch.stages import vllm_engine_stage

    asked: list[dict[str, Any]] = []

    async def generate(_: Any, row: dict[str, Any], __: Any) -> dict[str, Any]:
        asked.append(row.pop("sampling_params"))
        text = "" if row["note_id"] == "mute" and not asked[-1]["temperature"] else "A cat."
        return {"generated_text": text, "num_generated_tokens": 3, ERROR: ""}

    monkeypatch.setattr(vllm_engine_stage.vLLMEngineStageUDF, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(vllm_engine_stage.vLLMEngineStageUDF, "_generate_with_error_handling", generate)
    facts = ModelFacts("m", "Qwen2VLForConditionalGeneration", True, None, "f")
    engine = module.summary_engine(facts, GenerationSettings(), ASKING)(engine_kwargs={})
    rows = [{"note_id": name, "sampling_params": ASKING.sampling(name, 0)} for name in ("plain", "mute")]
    answers = [asyncio.run(engine._generate_with_error_handling(row, "b")) for row in rows]
    assert [one[ASKED] for one in answers] == [1, 2] and len(asked) == 3
    assert [one["generated_text"] for one in answers] == ["A cat."] * 2
