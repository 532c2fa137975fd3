"""The actor of Ray's engine stage as image summaries use it."""

from __future__ import annotations

from typing import Any

from notellm2_ray.core.cards import only_start
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.card_memory import arguments_on_card
from notellm2_ray.infer.model_facts import ModelFacts


def summary_engine(facts: ModelFacts, generation: GenerationSettings) -> type[Any]:
    """The class of the stage's actors: on a GPU an engine starts alone, and with arguments for that GPU."""
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    class SummaryEngine(vLLMEngineStageUDF):
        def __init__(self, *, engine_kwargs: dict[str, Any], **stage: Any) -> None:
            if not generation.gpus_per_engine:
                super().__init__(engine_kwargs=engine_kwargs, **stage)
                return
            with only_start():
                arguments = arguments_on_card(facts, generation, engine_kwargs, offline=True)
                super().__init__(engine_kwargs=arguments, **stage)

    return SummaryEngine
