"""What it saves to share a user's prefix when candidates are scored.

Our layout is compared with the paper's, which begins with the candidate's image.

    python benchmarks/scoring.py            # 32 users, 21 candidates each, a random MLLM of the demo's size
    python benchmarks/scoring.py --model runs/world/tiny_mllm --users 64 --block-tokens 32 64 128

Both layouts hold the same words. They take turns on the same vLLM engine, and its prefix cache is emptied between
turns. Tokens are vLLM's own counters (prefix_cache_queries and prefix_cache_hits). vLLM shares whole blocks of a
prompt. The rest of the shared part, half a block on average, is computed again for every candidate, and a prompt
shorter than a block shares nothing. On a CPU vLLM's default is blocks of 128 tokens. Scoring asks for 32, the smallest
size that its CPU kernels support. On a GPU the default of 16 is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import machine
from _mllm import SEED, WORDS, save_random_mllm

from notellm2_ray.core.settings import GenerationSettings, RankerSettings

LAYOUTS = ("shared_prefix", "image_first")
CANDIDATES = 21  # a target and 20 negatives
ROUNDS = 3


def questions(users: int, words: int) -> list[list[Any]]:
    """Each user's questions: 21 notes with a picture each, and a taste of ``words`` words."""
    import numpy as np
    from PIL import Image

    from notellm2_ray.models.ranker.inputs import Question

    rng = random.Random(SEED)

    def picture(number: int) -> bytes:
        file = io.BytesIO()
        colours = np.random.default_rng(number).integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(colours).resize((84, 84)).save(file, "PNG")
        return file.getvalue()

    def say(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    notes = [(say(8), picture(i)) for i in range(300)]
    asked = []
    for _ in range(users):
        taste = f"The user appears to have a preference for {say(words)}."
        asked.append([Question(title, image, taste) for title, image in rng.sample(notes, CANDIDATES)])
    return asked


async def turns(model: Path, users: int, words: int, block_tokens: int) -> dict[str, Any]:
    """Computed tokens and candidates per second of both layouts, on one engine."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    from notellm2_ray.infer.engine import start_engine
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.infer.score import for_scoring
    from notellm2_ray.infer.score_worker import ScoreRequest, ask
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.ranker.inputs import RankerPrompter

    engine_kwargs = {"block_size": block_tokens, "disable_log_stats": False}
    generation = for_scoring(GenerationSettings(max_model_len=1024, engine_kwargs=engine_kwargs))
    chat = ChatTokenizer.from_pretrained(str(model))
    prompts = {}
    for layout in LAYOUTS:
        prompter = RankerPrompter(chat, RankerSettings(layout=layout))
        asked = [question for user in questions(users, words) for question in user]
        prompts[layout] = [ScoreRequest(None, prompter.prompt(one), prompter.image(one)) for one in asked]  # type: ignore[arg-type]
    engine = start_engine(check_model(model, images=True), generation, images=1)

    def counters() -> tuple[float, float]:
        found = {metric.name: getattr(metric, "value", 0) for metric in get_metrics_snapshot()}
        return found["vllm:prefix_cache_queries"], found["vllm:prefix_cache_hits"]

    results: dict[str, dict[str, list[float]]] = {name: {"computed": [], "rate": []} for name in LAYOUTS}
    await ask(engine, chat, prompts["shared_prefix"][:CANDIDATES], "warm")
    for number in range(ROUNDS):
        for layout in LAYOUTS if number % 2 == 0 else reversed(LAYOUTS):
            await engine.reset_prefix_cache()
            (queried, hit), begun = counters(), time.perf_counter()
            answers = await ask(engine, chat, prompts[layout], f"{layout}{number}")
            seconds = time.perf_counter() - begun
            queried_now, hit_now = counters()
            computed = queried_now - queried - (hit_now - hit)
            told = sum(len(one.prompt_token_ids) - (one.num_cached_tokens or 0) for one in answers)
            assert told == computed, f"the requests count {told} computed tokens, the engine {computed}"
            results[layout]["computed"].append(computed)
            results[layout]["rate"].append(len(answers) / seconds)
    engine.shutdown()
    return {**results, "prompt_tokens": queried_now - queried}


def run_apart(arguments: argparse.Namespace, model: Path, block_tokens: int) -> dict[str, Any]:
    """Measure one size of blocks in a process of its own."""
    options = ["--users", str(arguments.users), "--words", str(arguments.words), "--model", str(model)]
    command = [sys.executable, __file__, "--worker", str(block_tokens), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"blocks of {block_tokens} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(arguments: argparse.Namespace, model: Path) -> None:
    """Print tokens, rates and their ratios for every size of blocks."""
    for block_tokens in arguments.block_tokens:
        found = run_apart(arguments, model, block_tokens)
        print(f"blocks of {block_tokens} tokens:")
        for layout in LAYOUTS:
            tokens, rates = found[layout]["computed"], found[layout]["rate"]
            shown = ", ".join(f"{rate:.0f}" for rate in rates)
            print(f"  {layout:13s}: {statistics.median(tokens):9.0f} tokens computed; {shown} candidates/s")
        ours, theirs = (found[layout] for layout in LAYOUTS)
        computed = statistics.median(ours["computed"]) / statistics.median(theirs["computed"])
        rate = statistics.median(ours["rate"]) / statistics.median(theirs["rate"])
        print(f"  RATIO computed tokens, shared prefix / image first: {computed:.3f} (goal: at most 0.35)")
        print(f"  RATIO candidates per second, shared prefix / image first: {rate:.2f} (goal: at least 1.0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=32, help="users with 21 candidates each")
    parser.add_argument("--words", type=int, default=180, help="words of a user's preference")
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[32, 128], help="sizes of vLLM's blocks")
    parser.add_argument("--model", type=Path, help="a model's directory instead of the random one made here")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        from notellm2_ray.infer.engine import engine_environment

        os.environ.update(engine_environment(GenerationSettings()))
        print(json.dumps(asyncio.run(turns(arguments.model, arguments.users, arguments.words, arguments.worker))))
        return
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or save_random_mllm(Path(directory) / "mllm")
        print(f"{machine()}; {arguments.users} users, {CANDIDATES} candidates each")
        compare(arguments, model)


if __name__ == "__main__":
    main()
