"""A process of its own with one vLLM engine, which says what it makes of the ranker's questions.

Run as ``python -m tests.support.engine_answers MODEL``; the environment is that of ``engine_environment``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from notellm2_ray.core.settings import GenerationSettings, RankerSettings
from tests.support import ROOT, tiny_models

GENERATION = GenerationSettings(dtype="float32", max_model_len=1024, max_sequences=4)
SHAPES = ((96, 96), (200, 80), (50, 150))


class Answer(NamedTuple):
    """What the engine saw and said."""

    ids: list[int]
    yes: float


def questions() -> list[Any]:
    """One question for each shape of image, and one without an image."""
    from notellm2_ray.models.ranker.inputs import Question

    shown = [Question("cat", tiny_models.picture(i, size), "the sea") for i, size in enumerate(SHAPES)]
    return [*shown, Question("cat", None, "the sea")]


def engine_answers(model: str) -> list[Answer]:
    """The answers of an engine in a new process, which ends with it."""
    from notellm2_ray.infer.engine import engine_environment

    environment = {**os.environ, **engine_environment(GENERATION)}
    command = [sys.executable, "-m", "tests.support.engine_answers", model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])]


async def _answers(model: str) -> list[Answer]:
    from notellm2_ray.infer.engine import start_engine
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.infer.score import for_scoring
    from notellm2_ray.infer.score_worker import ScoreRequest, ask, yes_share
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.ranker.inputs import RankerPrompter

    prompter = RankerPrompter(ChatTokenizer.from_pretrained(model), RankerSettings())
    pixels = prompter.settings.max_image_pixels
    engine = start_engine(check_model(model, images=True), for_scoring(GENERATION), images=1, pixels=pixels)
    row: Any = None
    requests = [ScoreRequest(row, prompter.prompt(one), prompter.image(one)) for one in questions()]
    answers = await ask(engine, prompter.chat, requests, "test")
    engine.shutdown()
    return [Answer(list(one.prompt_token_ids), yes_share(one, prompter.chat)) for one in answers]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_answers(sys.argv[1]))))
