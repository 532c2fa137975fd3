"""vLLM engines for the online service, started inside a replica with the parts of ``infer`` and ``models``."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.serve import DeploymentSettings

if TYPE_CHECKING:
    from notellm2_ray.infer.model_facts import ModelFacts
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.ranker.inputs import Question, RankerPrompter


def engine_settings(settings: Settings, deployment: DeploymentSettings) -> Settings:
    """The settings of a replica with an engine: it uses the CPUs and GPUs that the replica reserves."""
    reserved: dict[str, Any] = {"cpus_per_engine": deployment.cpus}
    if deployment.gpus is not None:
        reserved["gpus_per_engine"] = deployment.gpus
    return settings.model_copy(update={"generation": settings.generation.model_copy(update=reserved)})


def preference_writer(model: str, settings: Settings) -> Any:
    """The engine of the deployment Preferences: the bulk job's writer of preferences with vLLM in this process.

    Raises:
        ConfigError, ModelError: as :func:`check_preferences`.
    """
    from notellm2_ray.infer.engine import engine_environment, start_engine
    from notellm2_ray.infer.preference_steps import PreferenceWriter

    os.environ.update(engine_environment(settings.generation))
    facts, tokenizer = check_preferences(model, settings)
    engine = start_engine(facts, settings.generation, offline=False)
    language = settings.prompts.language
    return PreferenceWriter(engine, tokenizer, settings.preferences, settings.generation, language, settings.seed)


def yes_no_scorer(model: str, settings: Settings) -> YesNoScorer:
    """The engine of the deployment Ranker, with the bulk job's settings, so that scores are the same.

    Raises:
        ConfigError, ModelError: as :func:`check_ranker`.
    """
    from notellm2_ray.infer.engine import engine_environment, start_engine
    from notellm2_ray.infer.score import for_scoring

    generation = for_scoring(settings.generation)
    os.environ.update(engine_environment(generation))
    facts, prompter = check_ranker(model, settings)
    images, pixels = int(settings.ranker.variant != "tallrec"), settings.ranker.max_image_pixels
    # Graphs are captured here: with most of a prompt in the cache, few tokens are left to read.
    engine = start_engine(facts, generation, images=images, pixels=pixels, recurring=True, offline=False)
    return YesNoScorer(engine, prompter)


def check_preferences(model: str, settings: Settings) -> tuple[ModelFacts, ChatTokenizer]:
    """The model's facts and tokenizer, checked before any engine starts.

    Raises:
        ConfigError: no prompt fits into an engine, or the settings contradict each other.
        ModelError: vLLM cannot run the model.
    """
    from notellm2_ray.infer.engine import engine_arguments
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.infer.preference_steps import check_room
    from notellm2_ray.models.chat import ChatTokenizer

    facts = check_model(model, images=False)
    engine_arguments(facts, settings.generation)
    tokenizer = ChatTokenizer.from_pretrained(facts.model)
    check_room(tokenizer, settings.preferences, settings.generation, settings.prompts.language)
    return facts, tokenizer


def check_ranker(model: str, settings: Settings) -> tuple[ModelFacts, RankerPrompter]:
    """The model's facts and the ranker's prompts, checked before any engine starts.

    Raises:
        ConfigError: a prompt can be too long for an engine, or the settings contradict each other.
        ModelError: vLLM cannot run the model.
    """
    from notellm2_ray.infer.engine import engine_arguments
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.processors import load_processor
    from notellm2_ray.models.ranker.inputs import RankerPrompter
    from notellm2_ray.models.ranker.room import check_ranker as check_prompts

    shows_images = settings.ranker.variant != "tallrec"
    facts = check_model(model, images=shows_images)
    engine_arguments(facts, settings.generation, images=int(shows_images))
    processor = load_processor(facts.model)
    prompter = RankerPrompter(ChatTokenizer.of(processor), settings.ranker, settings.prompts.language)
    check_prompts(prompter, processor, facts.model, settings.generation.max_model_len)
    return facts, prompter


class YesNoScorer:
    """Scores candidates by P(yes).

    Args:
        engine: of the ranker, from ``start_engine``.
        prompter: makes the prompts that the ranker was tuned with.
    """

    def __init__(self, engine: Any, prompter: RankerPrompter) -> None:
        self.engine, self.prompter = engine, prompter
        self.numbers = itertools.count()

    async def score(
        self, preference: str | None, history_titles: Sequence[str], candidates: Sequence[tuple[str, bytes | None]]
    ) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) of each candidate (title, encoded image).

        None if the image does not decode, the prompt does not fit, or the score is not finite.
        """
        from notellm2_ray.infer.score_worker import ask, yes_share
        from notellm2_ray.models.ranker.inputs import Question

        questions = [Question(title, image, preference, tuple(history_titles)) for title, image in candidates]
        prompts = await asyncio.gather(*(asyncio.to_thread(self._prompt, question) for question in questions))
        asked = [prompt for prompt in prompts if prompt is not None]
        chat = self.prompter.chat
        answers = iter(await ask(self.engine, chat, asked, f"serve-{next(self.numbers)}"))
        scores: list[float | None] = []
        for prompt in prompts:
            answer = None if prompt is None else next(answers)
            score = math.nan if answer is None or isinstance(answer, ValueError) else yes_share(answer, chat)
            scores.append(score if math.isfinite(score) else None)
        return scores

    def _prompt(self, question: Question) -> Any:
        from notellm2_ray.core.candidate_rows import CandidateRow
        from notellm2_ray.infer.score_worker import ScoreRequest

        try:
            image = self.prompter.image(question)
        except DataError:
            return None
        return ScoreRequest(CandidateRow("", "", 0, None, ()), self.prompter.prompt(question), image)
