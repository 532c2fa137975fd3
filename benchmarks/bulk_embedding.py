"""Bulk embedding through Ray Data against the bare loop around the same model, with the same notes and batches.

    python benchmarks/bulk_embedding.py                 # 20,000 notes of the world, the demo's tiny embedder
    python benchmarks/bulk_embedding.py --notes 2000 --repeats 1

The bare loop is one process that reads the Parquet files chunk by chunk and calls NoteEncoder.encode on each. The other
contender is embed_notes with one actor, which also writes its chunks to disk, can be resumed and counts bad notes. They
take turns, each in a process of its own with the same number of torch threads. "steady" is the rate from the end of the
first chunk to the end of the last. "start-up" is the time before that: imports, the model, Ray's actors, the first
block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measure import machine
from _world import build_tiny_embedder, write_world_notes

from notellm2_ray.core.settings import EmbedSettings, RaySettings


def bare_loop(model: Path, notes: Path, settings: EmbedSettings) -> dict[str, float]:
    """Read, preprocess and encode chunk after chunk, and do nothing else."""
    started = time.perf_counter()
    import torch

    from notellm2_ray.infer.chunks import list_note_files, plan_chunks, read_chunk
    from notellm2_ray.models.embedder.encoder import NoteEncoder

    torch.set_num_threads(int(settings.cpus_per_actor))
    encoder = NoteEncoder.from_pretrained(model, precision=settings.precision)
    plan = plan_chunks(list_note_files(notes), settings.chunk_rows, "")
    ends = []
    for chunk in plan.chunks:
        encoder.encode(read_chunk(chunk), batch_tokens=settings.batch_tokens, max_batch_notes=settings.max_batch_notes)
        ends.append(time.perf_counter())
    steady = (plan.notes - plan.chunks[0].rows) / (ends[-1] - ends[0])
    return {"steady": steady, "startup": ends[0] - started, "whole": plan.notes / (ends[-1] - started)}


def through_ray(model: Path, notes: Path, settings: EmbedSettings) -> dict[str, float]:
    """The product: a Ray Data actor pool, with parts on disk and a Lance table."""
    started = time.perf_counter()
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.infer.embed import embed_notes

    connect(RaySettings(object_store_gb=0.5))
    connected = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        counts = embed_notes(model, notes, Path(directory) / "embeddings", settings)
    seconds = time.perf_counter() - started
    steady = (counts["notes"] - settings.chunk_rows) / (counts["embed_seconds"] - counts["startup_seconds"])
    return {
        "steady": steady,
        "startup": connected + counts["startup_seconds"],
        "whole": counts["notes"] / seconds,
        "table": counts["table_seconds"],
    }


CONTENDERS = {"bare loop": bare_loop, "Ray Data": through_ray}


def run_apart(name: str, arguments: argparse.Namespace, model: Path, notes: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    options = ["--threads", str(arguments.threads), "--chunk-rows", str(arguments.chunk_rows)]
    command = [sys.executable, __file__, "--contender", name, "--model", str(model), "--data", str(notes), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(arguments: argparse.Namespace, model: Path, notes: Path) -> None:
    """Alternate the contenders and print their medians and the ratio."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(arguments.repeats):
        for name in CONTENDERS:
            result = run_apart(name, arguments, model, notes)
            runs[name].append(result)
            print(f"  turn {turn + 1}, {name:9s}: {result['steady']:7.1f} notes/s steady", flush=True)
    median = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in runs.items()
    }
    print(f"{'':12s}{'steady notes/s':>16s}{'start-up s':>12s}{'whole notes/s':>15s}")
    for name, values in median.items():
        print(f"{name:12s}{values['steady']:16.1f}{values['startup']:12.1f}{values['whole']:15.1f}")
    print(f"writing the Lance table: {median['Ray Data']['table']:.2f} s")
    ratios = [ray["steady"] / bare["steady"] for bare, ray in zip(runs["bare loop"], runs["Ray Data"], strict=True)]
    print(f"ratio of each turn: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    ratio = median["Ray Data"]["steady"] / median["bare loop"]["steady"]
    print(f"RATIO through Ray Data / bare loop, steady: {ratio:.3f} (goal: at least 0.85)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=20_000, help="notes of the world")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the loop, and CPUs of the actor")
    parser.add_argument("--chunk-rows", type=int, default=512, help="notes in a chunk (512: the demo's)")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="an embedder's directory instead of the tiny one made here")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = EmbedSettings(cpus_per_actor=arguments.threads, chunk_rows=arguments.chunk_rows)
    if arguments.contender:
        print(json.dumps(CONTENDERS[arguments.contender](arguments.model, arguments.data, settings)))
        return
    print(
        f"{machine()}; {arguments.notes} notes, {arguments.threads} torch thread(s), chunks of {arguments.chunk_rows}"
    )
    with tempfile.TemporaryDirectory() as directory:
        notes = write_world_notes(Path(directory) / "notes", arguments.notes, arguments.chunk_rows)
        model = arguments.model or build_tiny_embedder(Path(directory))
        compare(arguments, model, notes)


if __name__ == "__main__":
    main()
