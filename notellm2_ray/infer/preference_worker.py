"""The actor that makes users' preferences: one vLLM engine, one log, many chains at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.prompts import Language
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.infer.engine import engine_environment, start_engine
from notellm2_ray.infer.model_facts import ModelFacts
from notellm2_ray.infer.preference_log import LogWriter
from notellm2_ray.infer.preference_plan import Chain
from notellm2_ray.infer.preference_steps import PreferenceWriter


class PreferenceJob(NamedTuple):
    """What an actor needs to know."""

    facts: ModelFacts
    logs: Path
    settings: PreferenceSettings
    generation: GenerationSettings
    language: Language
    seed: int


class PendingChain(NamedTuple):
    """A chain, or the rest of one whose first steps are finished."""

    chain: Chain
    previous: str | None  # the preference before its first step


class ChainCounts(NamedTuple):
    """Sums over some finished chains."""

    steps: int
    prompt_tokens: int
    generated_tokens: int


class PreferenceEngine:
    """A Ray actor with async methods; its chains share the engine's batches, and none waits for another."""

    def __init__(self, job: PreferenceJob) -> None:
        self.job = job
        self.slots = asyncio.Semaphore(job.settings.concurrent_calls)
        self.starting = asyncio.Lock()
        self.writer: PreferenceWriter | None = None

    async def start(self) -> None:
        """Load the model, unless it is loaded already.

        Raises:
            ModelError: vLLM cannot run it.
        """
        async with self.starting:
            if self.writer is not None:
                return
            # Ray may have started this process for something else, without these variables.
            os.environ.update(engine_environment(self.job.generation))
            from notellm2_ray.models.chat import ChatTokenizer

            job = self.job
            tokenizer = ChatTokenizer.from_pretrained(job.facts.model)
            engine = start_engine(job.facts, job.generation)
            self.log = LogWriter(job.logs)
            self.writer = PreferenceWriter(engine, tokenizer, job.settings, job.generation, job.language, job.seed)

    async def run(self, pending: Sequence[PendingChain]) -> ChainCounts:
        """Make all steps of some chains; each step is in the log before the next one of its chain begins.

        Raises:
            ConfigError: a prompt does not fit into the context, however short.
            OSError: the log cannot be written.
        """
        await self.start()
        try:
            results = await asyncio.gather(*(self._chain(one) for one in pending))
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                os._exit(1)  # a dead vLLM engine cannot be revived: another actor takes over
            raise
        return ChainCounts(*map(sum, zip(*results, strict=True)))

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self.writer is not None:
            self.writer.engine.shutdown()

    async def _chain(self, pending: PendingChain) -> ChainCounts:
        assert self.writer is not None
        previous, prompt_tokens, generated_tokens = pending.previous, 0, 0
        async with self.slots:
            for step in pending.chain.steps:
                made = await self.writer.advance(previous, step.items, user=pending.chain.user, block=step.block)
                record: dict[str, Any] = {"key": step.key, "user": pending.chain.user, "block": step.block}
                await self.log.append({**record, **made._asdict()})
                previous = made.preference
                prompt_tokens += made.prompt_tokens
                generated_tokens += made.generated_tokens
        return ChainCounts(len(pending.chain.steps), prompt_tokens, generated_tokens)
