"""The actor that advances users' chains: one vLLM engine, one log, many chains at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.prompts import Language
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.infer.engine import ModelFacts, engine_environment, start_engine
from notellm2_ray.infer.preference_log import LogWriter
from notellm2_ray.infer.preference_plan import Chain
from notellm2_ray.infer.preference_steps import PreferenceWriter


class Job(NamedTuple):
    """What an actor needs to know."""

    facts: ModelFacts
    logs: Path
    settings: PreferenceSettings
    generation: GenerationSettings
    language: Language
    seed: int


class Work(NamedTuple):
    """A chain, or what is left of it."""

    chain: Chain
    previous: str | None  # the preference before its first step


class Done(NamedTuple):
    """What some chains came to."""

    steps: int
    prompt_tokens: int
    generated_tokens: int


class PreferenceEngine:
    """A Ray actor of async methods; its chains share the engine's batches, and none waits for another."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.slots = asyncio.Semaphore(job.settings.concurrent_calls)
        self.starting = asyncio.Lock()
        self.writer: PreferenceWriter | None = None

    async def start(self) -> None:
        """Load the model, unless it is loaded.

        Raises:
            ModelError: vLLM cannot run it.
        """
        async with self.starting:
            if self.writer is not None:
                return
            # Where Ray started this process for something else first, its environment is not all there yet.
            os.environ.update(engine_environment(self.job.generation))
            from notellm2_ray.models.chat import ChatTokenizer

            job = self.job
            tokenizer = ChatTokenizer.from_pretrained(job.facts.model)
            engine = start_engine(job.facts, job.generation)
            self.log = LogWriter(job.logs)
            self.writer = PreferenceWriter(engine, tokenizer, job.settings, job.generation, job.language, job.seed)

    async def run(self, works: Sequence[Work]) -> Done:
        """Take chains to their ends; every step is in the log before the next of its chain begins.

        Raises:
            ConfigError: a prompt cannot be made to fit.
            OSError: the log cannot be written.
        """
        await self.start()
        try:
            results = await asyncio.gather(*(self._chain(work) for work in works))
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                os._exit(1)  # vLLM's engine does not come back: another actor has to take over
            raise
        return Done(*map(sum, zip(*results, strict=True)))

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self.writer is not None:
            self.writer.engine.shutdown()

    async def _chain(self, work: Work) -> Done:
        assert self.writer is not None
        previous, prompt_tokens, generated_tokens = work.previous, 0, 0
        async with self.slots:
            for step in work.chain.steps:
                made = await self.writer.advance(previous, step.items, user=work.chain.user, block=step.block)
                record: dict[str, Any] = {"key": step.key, "user": work.chain.user, "block": step.block}
                await self.log.append({**record, **made._asdict()})
                previous = made.preference
                prompt_tokens += made.prompt_tokens
                generated_tokens += made.generated_tokens
        return Done(len(work.chain.steps), prompt_tokens, generated_tokens)
