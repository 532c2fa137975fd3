"""The actor of Ray's engine stage as image summaries use it."""

from __future__ import annotations

from typing import Any

from notellm2_ray.core.cards import only_start
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.card_memory import arguments_on_card
from notellm2_ray.infer.model_facts import ModelFacts
from notellm2_ray.infer.summary_rows import ASKED, Asking


def summary_engine(facts: ModelFacts, generation: GenerationSettings, asking: Asking) -> type[Any]:
    """The class of the stage's actors.

    On a GPU an engine starts alone and with arguments for that GPU. An image whose answer is unusable is asked for once
    more at once, by the same engine.
    """
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    class SummaryEngine(vLLMEngineStageUDF):
        def __init__(self, *, engine_kwargs: dict[str, Any], **stage: Any) -> None:
            if not generation.gpus_per_engine:
                super().__init__(engine_kwargs=engine_kwargs, **stage)
                return
            with only_start():
                arguments = arguments_on_card(facts, generation, engine_kwargs, offline=True)
                super().__init__(engine_kwargs=arguments, **stage)

        async def _generate_with_error_handling(self, row: dict[str, Any], batch_uuid: Any) -> dict[str, Any]:
            # The stage takes its columns out of the row that it is given.
            first = await super()._generate_with_error_handling(dict(row), batch_uuid)
            again = asking.again(row, first)
            if again is None:
                return {**first, ASKED: 1}
            return {**await super()._generate_with_error_handling(again, batch_uuid), ASKED: 2}

    return SummaryEngine
