"""The actor of scoring: it holds one vLLM engine and turns parts of candidates into files of P(yes)."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from notellm2_ray.core.candidate_rows import CandidateRow
from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.schema import SCORE_SCHEMA
from notellm2_ray.core.settings import GenerationSettings, RankerSettings
from notellm2_ray.core.settings.ranking import PromptLanguage
from notellm2_ray.infer.engine import engine_environment, start_engine
from notellm2_ray.infer.model_facts import ModelFacts
from notellm2_ray.infer.part_actors import PartActor
from notellm2_ray.infer.parts import PartStore, quarantine_table
from notellm2_ray.infer.score_parts import CandidatePart, ScoredPart, scored_parts
from notellm2_ray.infer.score_questions import Controls, Questions, ScoreFiles

if TYPE_CHECKING:
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.ranker.inputs import Question, RankerPrompter


class TableJob(NamedTuple):
    """One table of a job."""

    ranker: RankerSettings
    files: ScoreFiles
    controls: Controls
    output: Path
    language: PromptLanguage


class ScoreJob(NamedTuple):
    """What every actor of a job needs to know."""

    facts: ModelFacts
    generation: GenerationSettings
    tables: tuple[TableJob, ...]


class ScoreRequest(NamedTuple):
    """What the engine gets for one candidate."""

    row: CandidateRow
    ids: list[int]
    image: Any  # a PIL image, or None


class PartScorer(PartActor[CandidatePart, ScoredPart]):
    """Loads the model once, then scores one part a call; two calls may run at once."""

    part_type, finished_type = CandidatePart, ScoredPart

    def __init__(self, job: ScoreJob) -> None:
        self.job, self.engine = job, None
        self.stores = [scored_parts(table.output) for table in job.tables]
        self.lock = threading.Lock()
        self.questions: dict[int, tuple[Questions, RankerPrompter]] = {}
        # vLLM's engine runs in an event loop, while Ray Data calls this object from threads.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="engine", daemon=True).start()

    def __del__(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()

    def store(self, part: CandidatePart) -> PartStore[ScoredPart]:
        return self.stores[part.table]

    def describe(self, part: CandidatePart) -> str:
        return (
            f"part {part.part_id} with {self.job.facts.model} (if memory ran out, lower generation.max_sequences, "
            "generation.max_model_len, or reserve more with generation.gpus_per_engine)"
        )

    def make(self, part: CandidatePart) -> ScoredPart:
        with self.lock:
            if self.engine is None:
                self._load()
            if part.table not in self.questions:
                self.questions[part.table] = self._questions(self.job.tables[part.table])
        questions, prompter = self.questions[part.table]
        threads = max(1, int(self.job.generation.cpus_per_engine))
        requests, bad = _requests(questions, prompter, part.places, threads)
        try:
            asking = ask(self.engine, self.chat, requests, f"{part.part_id}/{part.table}/{os.getpid()}")
            answers = asyncio.run_coroutine_threadsafe(asking, self.loop).result()
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                os._exit(1)  # a dead vLLM engine cannot be revived: Ray starts this actor again
            raise
        return self._commit(part, requests, answers, bad)

    def _load(self) -> None:
        # Ray may have started this process for something else, without these variables.
        os.environ.update(engine_environment(self.job.generation))
        from notellm2_ray.models.chat import ChatTokenizer

        self.chat = ChatTokenizer.from_pretrained(self.job.facts.model)
        self.engine = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()
        for table in self._with_images()[:1]:
            self._compare(table)

    async def _start(self) -> Any:
        sees = self._with_images()
        pixels = max((table.ranker.max_image_pixels for table in sees), default=None)
        images = int(bool(sees))
        return start_engine(
            self.job.facts, self.job.generation, images=images, pixels=pixels, recurring=True, one_token=True
        )

    def _with_images(self) -> list[TableJob]:
        return [table for table in self.job.tables if table.ranker.variant != "tallrec"]

    def _compare(self, table: TableJob) -> None:
        """Ask the engine about images of a few shapes, and compare what it saw with what the model is tuned on."""
        from notellm2_ray.models.processors import load_processor
        from notellm2_ray.models.ranker.inputs import RankerPrompter
        from notellm2_ray.models.ranker.room import compare_prompts, probes

        prompter, model = RankerPrompter(self.chat, table.ranker, table.language), self.job.facts.model
        asked = probes(table.ranker.max_image_pixels)
        nobody = CandidateRow("", "", 0, None, ())
        requests = [ScoreRequest(nobody, prompter.prompt(one), prompter.image(one)) for one in asked]
        asking = ask(self.engine, self.chat, requests, f"probe/{os.getpid()}")
        try:
            answers = asyncio.run_coroutine_threadsafe(asking, self.loop).result()
            for refused in (answer for answer in answers if isinstance(answer, ValueError)):
                raise refused
        except Exception as error:  # any error: the model does not run, and the message says why
            raise ModelError(f"{model}: vLLM cannot read a prompt with an image: {error.__cause__ or error}") from error
        compare_prompts(prompter, load_processor(model), model, asked, [answer.prompt_token_ids for answer in answers])

    def _questions(self, table: TableJob) -> tuple[Questions, RankerPrompter]:
        from notellm2_ray.models.ranker.inputs import RankerPrompter

        return Questions(table.files, table.ranker, table.controls), RankerPrompter(
            self.chat, table.ranker, table.language
        )

    def _commit(
        self, part: CandidatePart, requests: Sequence[ScoreRequest], answers: Sequence[Any], bad: list[tuple[str, str]]
    ) -> ScoredPart:
        rows, prompt_tokens, cached = [], 0, 0
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, ValueError):
                bad.append((_key(request.row), f"vLLM refuses the prompt: {answer}"))
                continue
            score = yes_share(answer, self.chat)
            if not math.isfinite(score):
                bad.append((_key(request.row), "its score is NaN"))
                continue
            row = request.row
            rows.append({"example_id": row.example_id, "note_id": row.note_id, "label": row.label, "score": score})
            prompt_tokens += len(answer.prompt_token_ids)
            cached += answer.num_cached_tokens or 0
        if requests and not rows:
            raise ModelError(
                f"{self.job.facts.model}: none of the {len(requests)} candidates of part {part.part_id} got a score "
                f"(the last one: {bad[-1][1]}). If prompts are too long, raise generation.max_model_len or lower "
                "ranker.max_preference_tokens; if scores are NaN, try generation.dtype=float32"
            )
        done = ScoredPart(
            part_id=part.part_id,
            model_fingerprint=self.job.facts.fingerprint,
            scored=len(rows),
            quarantined=len(bad),
            prompt_tokens=prompt_tokens,
            cached_tokens=cached,
        )
        table = pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)
        return self.store(part).commit(done, table, quarantine_table("candidates", part.part_id, bad))


def _requests(
    questions: Questions, prompter: RankerPrompter, places: Sequence[int], threads: int
) -> tuple[list[ScoreRequest], list[tuple[str, str]]]:
    """The requests for some candidates, and (key, reason) of the candidates that have no valid prompt.

    Args:
        threads: how many decode images, which the engine's front end would do one by one.
    """

    def one(asked: tuple[CandidateRow, Question | str]) -> ScoreRequest | tuple[str, str]:
        row, question = asked
        if isinstance(question, str):
            return _key(row), question
        try:
            return ScoreRequest(row, prompter.prompt(question), prompter.image(question))
        except DataError as error:
            return _key(row), str(error)

    with ThreadPoolExecutor(threads) as pool:
        made = list(pool.map(one, questions(places)))
    requests = [found for found in made if isinstance(found, ScoreRequest)]
    return requests, [found for found in made if not isinstance(found, ScoreRequest)]


async def ask(engine: Any, chat: ChatTokenizer, requests: Sequence[ScoreRequest], name: str) -> list[Any]:
    """vLLM's output for every request, or a ValueError for a prompt that it refuses.

    Args:
        engine: from :func:`~notellm2_ray.infer.engine.start_engine`.
        name: begins the ids of these requests, which must differ from all others.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    # One token is generated only to read the raw log-probabilities of Yes and No in its place.
    pair = [chat.yes_id, chat.no_id]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=pair, detokenize=False)

    async def one(number: int, asked: ScoreRequest) -> Any:
        request: dict[str, Any] = {"prompt_token_ids": asked.ids}
        if asked.image is not None:
            request["multi_modal_data"] = {"image": asked.image}
        try:
            return [output async for output in engine.generate(request, params, f"{name}/{number}")][-1]
        except (ValueError, VLLMValidationError) as error:  # the prompt is refused
            return ValueError(f"{str(error).splitlines()[0]} (generation.max_model_len)")

    return await asyncio.gather(*(one(number, asked) for number, asked in enumerate(requests)))


def yes_share(answer: Any, chat: ChatTokenizer) -> float:
    """P(yes) / (P(yes) + P(no)) from one of vLLM's outputs; NaN if neither log-probability is finite."""
    found = answer.outputs[0].logprobs[0]
    yes, no = (found[token].logprob for token in (chat.yes_id, chat.no_id))
    if not (math.isfinite(yes) or math.isfinite(no)):
        return math.nan
    return 1.0 / (1.0 + math.exp(min(no - yes, 700.0)))


def _key(row: CandidateRow) -> str:
    return f"{row.example_id} {row.note_id}"
