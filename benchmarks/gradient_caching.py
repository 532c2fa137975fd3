"""Training steps with and without gradient caching: notes per second, and the memory of batches up to 8,192 notes.

    python benchmarks/gradient_caching.py
    python benchmarks/gradient_caching.py --notes 64 256 --notes-per-pass 32 --steps 1
    python benchmarks/gradient_caching.py --llm DIR --vision DIR --notes 32 --notes-per-pass 8

The model is the demo's, or one of these parts; the notes are the world's. Every size runs in a process of its own, on a
GPU if there is one. A step has everything from prepared notes to updated weights. Memory is the peak during steps
beyond what the process held before the first one: model and prepared notes. (On a GPU: of all tensors.) Batches of up
to ``--whole`` notes also run without caching; larger ones would not fit into the memory of most machines. On a busy
machine CPU time tells more than time, best with one thread, since waiting threads spin.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.dataset as ds
from _measure import machine, run_measured
from _world import SEED, build_tiny_embedder, write_world_notes

GOAL = 0.75


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and CPU seconds of a step (medians), and peak GiB, of one batch size in this process."""
    import numpy as np
    import torch

    from notellm2_ray.core.memory import keep_freed_memory
    from notellm2_ray.core.note_store import NoteStore
    from notellm2_ray.core.settings import TrainSettings
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from notellm2_ray.train.batches import NotePreparer
    from notellm2_ray.train.engines import make_engine
    from notellm2_ray.train.gradient_cache import begin_step
    from notellm2_ray.train.objectives import loss_of
    from notellm2_ray.train.step import EmbedderStep

    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = NoteEncoder.from_pretrained(arguments.model)
    count = arguments.notes[0]
    settings = TrainSettings(engine="plain", precision=arguments.precision, batch_pairs=count // 2, learning_rate=1e-5)
    step = EmbedderStep(
        encoder.model.train(), loss=loss_of(encoder.settings, settings), bf16=arguments.precision == "bf16"
    )
    engine = make_engine(step, settings, device)
    store = NoteStore(arguments.store)
    limit = arguments.notes_per_pass if arguments.cached else None
    prepare = NotePreparer(store, encoder.preprocessor, settings.length_chunks, max_notes=limit)
    ids = np.random.default_rng(SEED).choice(arguments.drawn, count, replace=count > arguments.drawn)
    names = sorted(store._rows)
    notes, keys = prepare([names[row] for row in ids]), torch.arange(count, device=device)
    before = psutil.Process().memory_info().rss
    seconds, cpu_seconds = [], []
    for _ in range(arguments.steps + (count <= arguments.whole)):  # the first step of a small batch is a warm-up
        started, cpu_started = time.perf_counter(), time.process_time()
        _, update = begin_step(engine, notes, keys, cached=arguments.cached)
        update(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    step_seconds, step_cpu_seconds = (statistics.median(taken[-arguments.steps :]) for taken in (seconds, cpu_seconds))
    return {"rate": count / step_seconds, "cpu_seconds": step_cpu_seconds, "gib": peak / 2**30}


def build(directory: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The embedder's directory and the store of the world's notes."""
    from notellm2_ray.core.note_store import NoteStore

    changes = {name: getattr(arguments, name) for name in ("llm", "vision") if getattr(arguments, name)}
    model = build_tiny_embedder(directory, variant=arguments.variant, **changes)
    drawn = write_world_notes(directory / "notes", arguments.drawn, 1000)
    NoteStore.write(directory / "notes.arrow", ds.dataset(drawn).to_batches())
    return model, directory / "notes.arrow"


def compare(arguments: argparse.Namespace) -> None:
    """Print speed and memory of every batch size."""
    print(f"{machine()}; {arguments.notes_per_pass} notes a pass, {arguments.threads} torch thread(s)", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        model, store = build(Path(directory), arguments)
        shared = [*sys.argv[1:], "--model", str(model), "--store", str(store)]

        def one(notes: int, cached: bool) -> dict[str, float]:
            command = [sys.executable, __file__, *shared, "--notes", str(notes), *(["--cached"] if cached else [])]
            return run_measured(command).answer

        first: dict[str, float] | None = None
        for notes in arguments.notes:
            cached = one(notes, True)
            first = first or cached
            line = f"{notes:6,d} notes   cached {cached['rate']:7.1f} notes/s, {cached['gib']:6.2f} GiB"
            line += f" ({cached['gib'] / first['gib']:.2f} x the first)"
            if notes <= arguments.whole:
                whole = one(notes, False)
                line += f"   whole {whole['rate']:7.1f} notes/s, {whole['gib']:6.2f} GiB"
                line += f"   RATIO {cached['rate'] / whole['rate']:.2f}"
                line += f" ({whole['cpu_seconds'] / cached['cpu_seconds']:.2f} by CPU time)"
            print(line, flush=True)
    print(f"goal: a ratio of at least {GOAL}, and memory that does not grow with the batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, nargs="+", default=[256, 1024, 8192], help="notes of a step")
    parser.add_argument("--notes-per-pass", type=int, default=64)
    parser.add_argument("--whole", type=int, default=1024, help="most notes that are also trained on without caching")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each size")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--variant", default="notellm2")
    parser.add_argument("--drawn", type=int, default=2000, help="different notes; a larger batch has copies")
    parser.add_argument("--llm", help="directory of a language model instead of the packaged one")
    parser.add_argument("--vision", help="directory of a vision encoder instead of the packaged one")
    for name in ("--model", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is None:
        compare(arguments)
    else:
        print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
