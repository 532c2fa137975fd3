"""Recurrent preferences: our chains against one user after another, and against a barrier after every block.

    python benchmarks/preferences.py            # users with 1 to 12 blocks, a random MLLM of the demo's size
    python benchmarks/preferences.py --model runs/world/tiny_mllm --users 48

Contenders, each in a process of its own:
    ray           summarize_preferences itself: for each of two cores an actor with a compiled engine of one thread,
                  384 users at once, and logs on disk. Its rate leaves the start-up out. There are so many users that
                  the last ones, during which the engines are not full, hardly count
    transformers  the published way: one user after another and one block after another, through model.generate. It
                  gets fewer users, since its rate does not depend on their number
    engine        one engine without Ray or logs, on fewer users, used in two ways: every chain advances on its own, the
                  longest first, as in the product; or block b of all users is done before any block b + 1. The two take
                  turns on the same engine, and its prefix cache is emptied between turns
All of them decode greedily, with the same prompts and the same limit of tokens, and may use all cores of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
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

from notellm2_ray.core.recommend_prompts import Item, preference_prompt
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings, RaySettings

SUMMARIES, BLOCKS, TITLES = "summaries.parquet", "blocks.parquet", "titles.json"
GENERATION = GenerationSettings(max_model_len=1024, max_sequences=128, cpus_per_engine=2)
USERS_AT_ONCE = 384  # in one engine; 512 were no quicker
PER_CORE = GENERATION.model_copy(
    update={"engines": 2, "cpus_per_engine": 1, "enforce_eager": False, "max_sequences": USERS_AT_ONCE}
)


def write_data(directory: Path, users: int, longest: int) -> None:
    """Write histories of skewed lengths: many short ones, and a few of up to ``longest`` blocks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from notellm2_ray.core.schema import BLOCK_SCHEMA, SUMMARY_SCHEMA

    rng = random.Random(SEED)
    titles = {f"n{i}": " ".join(rng.choices(WORDS, k=8)) for i in range(500)}
    shown = [{"note_id": key, "summary": " ".join(rng.choices(WORDS, k=12))} for key in titles]
    counts = {"prompt_tokens": 0, "generated_tokens": 0}
    pq.write_table(pa.Table.from_pylist([row | counts for row in shown], schema=SUMMARY_SCHEMA), directory / SUMMARIES)
    rows = []
    for user in range(users):
        blocks = min(longest, 1 + int(rng.paretovariate(1.0)))
        rows += [
            {"user_id": f"u{user:05d}", "block": block, "note_ids": rng.choices(list(titles), k=3)}
            for block in range(blocks)
        ]
    pq.write_table(pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA), directory / BLOCKS)
    (directory / TITLES).write_text(json.dumps(titles))


def histories(directory: Path) -> list[list[list[Item]]]:
    """The items of each user's blocks."""
    from notellm2_ray.infer.preference_plan import plan_chains, read_summaries

    titles = json.loads((directory / TITLES).read_text())
    plan = plan_chains(
        directory / BLOCKS, titles, read_summaries(directory / SUMMARIES), PreferenceSettings(), "benchmark"
    )
    return [[step.items for step in chain.steps] for chain in plan.chains]


def through_ray(model: Path, data: Path, settings: PreferenceSettings, fewer_users: int) -> dict[str, float]:
    """The product."""
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.infer.preferences import summarize_preferences

    connect(RaySettings(object_store_gb=0.2))
    titles = json.loads((data / TITLES).read_text())
    settings = settings.model_copy(update={"concurrent_calls": USERS_AT_ONCE})
    with tempfile.TemporaryDirectory() as output:
        counts = summarize_preferences(
            model, data / BLOCKS, titles, data / SUMMARIES, Path(output), settings, PER_CORE, "en", seed=SEED
        )
    seconds = counts["generate_seconds"]
    return {
        "rate": counts["preferences"] / seconds,
        "tokens": counts["generated_tokens"] / seconds,
        "startup": counts["startup_seconds"],
    }


def one_after_another(model: Path, data: Path, settings: PreferenceSettings, fewer_users: int) -> dict[str, float]:
    """One user after another, through transformers' generate."""
    import torch
    from transformers import AutoModelForImageTextToText

    from notellm2_ray.infer.answers import cut_at_sentence, one_paragraph
    from notellm2_ray.models.chat import ChatTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    chat = ChatTokenizer.from_pretrained(str(model))
    network = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval()
    users = histories(data)[:fewer_users]
    steps = tokens = 0

    @torch.inference_mode()
    def answer(ids: list[int]) -> str:
        nonlocal tokens
        prompt = torch.tensor([ids])
        made = network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings.max_tokens,
            do_sample=False,
            eos_token_id=chat.end_ids,
        )[0, len(ids) :]
        tokens += len(made)
        return cut_at_sentence(one_paragraph(chat.decode(made.tolist())))

    answer(chat.prompt(preference_prompt("en", "recurrent", None, users[0][0])))  # warms up
    steps = tokens = 0
    started = time.perf_counter()
    for blocks in users:
        previous: str | None = None
        for items in blocks:
            previous = answer(chat.prompt(preference_prompt("en", "recurrent", previous, items))) or previous
            steps += 1
    seconds = time.perf_counter() - started
    return {"rate": steps / seconds, "tokens": tokens / seconds}


def on_one_engine(model: Path, data: Path, settings: PreferenceSettings, fewer_users: int) -> dict[str, Any]:
    """Chains without barriers and with them, in turns on one engine."""
    from notellm2_ray.infer.engine import engine_environment

    os.environ.update(engine_environment(GENERATION))
    return asyncio.run(_turns(model, data, settings, fewer_users))


async def _turns(model: Path, data: Path, settings: PreferenceSettings, fewer_users: int) -> dict[str, Any]:
    from notellm2_ray.infer.engine import start_engine
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.infer.preference_steps import PreferenceWriter
    from notellm2_ray.models.chat import ChatTokenizer

    started = time.perf_counter()
    engine = start_engine(check_model(model, images=False), GENERATION)
    chat = ChatTokenizer.from_pretrained(str(model))
    writer = PreferenceWriter(engine, chat, settings, GENERATION, "en", SEED)
    users = histories(data)[:fewer_users]
    startup = time.perf_counter() - started
    steps = sum(map(len, users))
    slots = asyncio.Semaphore(settings.concurrent_calls)

    async def write(previous: str | None, items: list[Item]) -> str:
        return (await writer.advance(previous, items, user="", block=0)).preference

    async def step(previous: str | None, items: list[Item]) -> str:
        async with slots:
            return await write(previous, items)

    async def chain(blocks: list[list[Item]]) -> None:
        previous: str | None = None
        async with slots:
            for items in blocks:
                previous = await write(previous, items)

    async def chains() -> None:
        await asyncio.gather(*map(chain, sorted(users, key=len, reverse=True)))

    async def barriers() -> None:
        states: list[str | None] = [None] * len(users)
        for block in range(max(map(len, users))):
            here = [user for user, blocks in enumerate(users) if block < len(blocks)]
            made = await asyncio.gather(*(step(states[user], users[user][block]) for user in here))
            for user, state in zip(here, made, strict=True):
                states[user] = state

    await chains()  # warms up
    rates: dict[str, list[float]] = {"chains": [], "barriers": []}
    for _ in range(3):
        for name, work in (("chains", chains), ("barriers", barriers)):
            await engine.reset_prefix_cache()
            begun = time.perf_counter()
            await work()
            rates[name].append(steps / (time.perf_counter() - begun))
    engine.shutdown()
    return {**rates, "startup": startup}


CONTENDERS = {"ray": through_ray, "transformers": one_after_another, "engine": on_one_engine}


def run_apart(name: str, arguments: argparse.Namespace, model: Path, data: Path) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    users = arguments.slow_users if name == "transformers" else arguments.engine_users
    options = ["--fewer-users", str(users), "--max-tokens", str(arguments.max_tokens)]
    command = [sys.executable, __file__, "--contender", name, "--model", str(model), "--data", str(data), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    # Ray may still print lines of its workers after the answer.
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def compare(arguments: argparse.Namespace, model: Path, data: Path) -> None:
    """Run the contenders and print their ratios."""
    slow = run_apart("transformers", arguments, model, data)
    print(f"  transformers, one user after another: {slow['rate']:8.2f} calls/s, {slow['tokens']:8.0f} tokens/s")
    ray = run_apart("ray", arguments, model, data)
    print(f"  chains through Ray and vLLM:          {ray['rate']:8.2f} calls/s, {ray['tokens']:8.0f} tokens/s", end="")
    print(f" (start-up {ray['startup']:.0f} s apart)")
    engine = run_apart("engine", arguments, model, data)
    for name in ("chains", "barriers"):
        rates = ", ".join(f"{rate:.1f}" for rate in engine[name])
        print(f"  bare engine, {name:9s}:              {rates} calls/s")
    ratio = statistics.median(engine["chains"]) / statistics.median(engine["barriers"])
    print(f"RATIO chains through Ray / one user after another: {ray['rate'] / slow['rate']:.1f} (goal: at least 15)")
    print(f"RATIO chains / barrier after every block, bare engine: {ratio:.2f} (goal: at least 1.0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1600, help="users with histories of 1 to --longest blocks")
    parser.add_argument("--slow-users", type=int, default=10, help="how many of them transformers gets")
    parser.add_argument("--engine-users", type=int, default=400, help="how many of them the bare engine gets")
    parser.add_argument("--longest", type=int, default=12, help="blocks of a history at most")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a preference at most")
    parser.add_argument("--model", type=Path, help="a model's directory instead of the random one made here")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fewer-users", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = PreferenceSettings(max_tokens=arguments.max_tokens)
    if arguments.contender:
        work = CONTENDERS[arguments.contender]
        print(json.dumps(work(arguments.model, arguments.data, settings, arguments.fewer_users)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_data(Path(directory), arguments.users, arguments.longest)
        lengths = [len(blocks) for blocks in histories(Path(directory))]
        print(f"{machine()}; {len(lengths)} users, {sum(lengths)} calls, longest history {max(lengths)} blocks")
        model = arguments.model or save_random_mllm(Path(directory) / "mllm")
        compare(arguments, model, Path(directory))


if __name__ == "__main__":
    main()
