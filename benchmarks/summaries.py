"""Image summaries through Ray Data against the bare loop around the same vLLM engine, on the same images.

    python benchmarks/summaries.py                         # 3,000 notes of the world, a random MLLM of the demo's size
    python benchmarks/summaries.py --model runs/world/tiny_mllm --trained --notes 2000

The bare loop is one process that reads the Parquet files, decodes the images and gives them to vLLM's LLM class, as
many at a time as the pipeline works on at once. The other contender is summarize_images, which also checks every image,
writes each batch to disk and can be resumed. "steady" is the rate from the end of the first batch to the end of the
last. "start-up" is the time before that: imports, the engine, Ray's actors, the first batch. For summarize_images it
also holds the start of a second engine. That one asks again for the few answers in which a random model repeats itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import machine
from _mllm import save_random_mllm
from _world import write_world_notes

from notellm2_ray.core.recommend_prompts import summary_prompt
from notellm2_ray.core.settings import GenerationSettings, RaySettings, SummarySettings

GENERATION = GenerationSettings(max_model_len=512, max_sequences=128)


def bare_loop(model: Path, notes: Path, settings: SummarySettings) -> dict[str, float]:
    """vLLM's own offline class and nothing else."""
    started = time.perf_counter()
    from notellm2_ray.core.images import scaled_image
    from notellm2_ray.infer.chunks import list_note_files, plan_chunks, read_chunk
    from notellm2_ray.infer.engine import engine_arguments, engine_environment
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.models.chat import ChatTokenizer

    os.environ.update(engine_environment(GENERATION))
    from vllm import LLM, SamplingParams

    chat = ChatTokenizer.from_pretrained(str(model))
    prompt = chat.prompt(summary_prompt("en"))
    engine = LLM(model=str(model), **engine_arguments(check_model(model, images=True), GENERATION, images=1))
    sampling = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.temperature, seed=1, stop_token_ids=chat.end_ids
    )
    plan = plan_chunks(list_note_files(notes), settings.batch_rows * settings.concurrent_batches, "")
    ends, tokens = [], 0
    for chunk in plan.chunks:
        prompts: list[Any] = [
            {
                "prompt_token_ids": prompt,
                "multi_modal_data": {"image": scaled_image(note.image, settings.max_image_pixels)},
            }
            for note in read_chunk(chunk)
            if note.image
        ]
        for output in engine.generate(prompts, sampling, use_tqdm=False):
            tokens += len(output.outputs[0].token_ids)
        ends.append(time.perf_counter())
    steady = (plan.notes - plan.chunks[0].rows) / (ends[-1] - ends[0])
    return {"steady": steady, "startup": ends[0] - started, "tokens": tokens / plan.notes}


def through_ray(model: Path, notes: Path, settings: SummarySettings) -> dict[str, float]:
    """The product: a ray.data.llm pipeline that writes its parts to disk."""
    started = time.perf_counter()
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.infer.summaries import summarize_images

    connect(RaySettings(object_store_gb=0.5))
    connected = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        counts = summarize_images(model, notes, Path(directory) / "out", settings, GENERATION, "en")
    return {
        "steady": (counts["notes"] - settings.batch_rows) / counts["generate_seconds"],
        "startup": connected + counts["startup_seconds"],
        "tokens": counts["generated_tokens"] / counts["notes"],
    }


CONTENDERS = {"bare loop": bare_loop, "Ray Data": through_ray}


def run_apart(name: str, arguments: argparse.Namespace, model: Path, notes: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    command = [sys.executable, __file__, "--contender", name, "--model", str(model), "--data", str(notes)]
    command += ["--max-tokens", str(arguments.max_tokens), *(["--trained"] if arguments.trained else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    # Ray may still print lines of its workers after the answer.
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def compare(arguments: argparse.Namespace, model: Path, notes: Path) -> None:
    """Alternate the contenders and print their medians and the ratio."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(arguments.repeats):
        for name in CONTENDERS:
            result = run_apart(name, arguments, model, notes)
            runs[name].append(result)
            print(
                f"  turn {turn + 1}, {name:9s}: {result['steady']:7.1f} images/s steady, "
                f"start-up {result['startup']:.0f} s, {result['tokens']:.0f} tokens an image",
                flush=True,
            )
    median = {name: statistics.median(result["steady"] for result in results) for name, results in runs.items()}
    ratio = median["Ray Data"] / median["bare loop"]
    print(f"RATIO through Ray Data / bare vLLM loop, steady: {ratio:.2f} (goal: at least 0.6)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=3000, help="notes of the world, each with a drawn image")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each contender")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of a summary at most")
    parser.add_argument("--model", type=Path, help="a model's directory instead of the random one made here")
    parser.add_argument("--trained", action="store_true", help="the model is a trained one: decode greedily")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # A random model that decodes greedily repeats itself, and every answer would be asked for twice: so it samples.
    temperature = 0.0 if arguments.trained else 1.0
    settings = SummarySettings(max_tokens=arguments.max_tokens, max_bad_share=1.0, temperature=temperature)
    if arguments.contender:
        print(json.dumps(CONTENDERS[arguments.contender](arguments.model, arguments.data, settings)))
        return
    print(f"{machine()}; {arguments.notes} notes, answers of at most {arguments.max_tokens} tokens")
    with tempfile.TemporaryDirectory() as directory:
        notes = write_world_notes(Path(directory) / "notes", arguments.notes, 128)
        model = arguments.model or save_random_mllm(Path(directory) / "mllm")
        compare(arguments, model, notes)


if __name__ == "__main__":
    main()
