"""How much the demo's recall depends on the seed and on the processor's arithmetic.

    notellm2 run-retrieval --preset demo
    python benchmarks/demo_spread.py
    python benchmarks/demo_spread.py --seeds 42 43 --arithmetic fp32 --embedders notellm2

From one prepared world, every embedder is trained with every seed and in every arithmetic, each in a process of its
own without Ray, and tested on the demo's test pairs. ``amx`` is bfloat16 with all that the processor has, ``avx512``
bfloat16 without its matrix unit, ``fp32`` what processors without bfloat16 do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from _measure import machine

ARITHMETIC = {
    "amx": ("bf16", {}),
    "avx512": ("bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "fp32": ("fp32", {}),
}


def one(workspace: Path, embedder: str, seed: int, precision: str) -> None:
    """Train one embedder and print R@10 and R@100 in percent."""
    import torch

    from notellm2_ray.core.schema import iter_notes
    from notellm2_ray.core.workspace import Workspace
    from notellm2_ray.evaluate.recall.metrics import recall_at, target_ranks
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from notellm2_ray.pipeline.embedders import model_paths
    from notellm2_ray.presets import load_settings
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun
    from notellm2_ray.train.run_loop import prepare_process

    changes = ["train.engine=plain", f"train.precision={precision}", f"model.variant={embedder}"]
    settings = load_settings(None, "demo", [f"workspace={workspace}", *changes])
    prepare_process(1)
    place = Workspace(settings.workspace)
    llm, vision = model_paths(settings)
    with tempfile.TemporaryDirectory() as output:
        job = EmbedderJob(settings.model, settings.train, seed, place.pairs, llm, vision, Path(output))
        run = EmbedderRun(job, torch.device("cpu"), lambda directory, figures: None)
        run.run()
        assert run.state.best_step is not None
        encoder = NoteEncoder.from_pretrained(run.files.best(run.state.best_step))
    ids = pq.read_table(place.test_pool)["note_id"].to_pylist()
    found = {note.note_id: note for note in iter_notes(pq.read_table(place.notes))}
    row = {note_id: number for number, note_id in enumerate(ids)}
    vectors = encoder.encode([found[note_id] for note_id in ids])
    pairs = pq.read_table(place.test_pairs)
    queries, targets = (np.array([row[one] for one in pairs[name].to_pylist()]) for name in ("query_id", "target_id"))
    recall = recall_at(target_ranks(vectors[queries], vectors, queries, targets), [10, 100])
    print(f"{100 * recall[10]:.2f} {100 * recall[100]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("runs/world"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--embedders", nargs="+", default=["basic", "notellm2"])
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        embedder, seed, precision = arguments.one
        return one(arguments.workspace, embedder, int(seed), precision)
    print(machine())
    for embedder in arguments.embedders:
        for name in arguments.arithmetic:
            precision, environment = ARITHMETIC[name]
            figures = []
            for seed in arguments.seeds:
                command = [sys.executable, __file__, "--workspace", str(arguments.workspace)]
                command += ["--one", embedder, str(seed), precision]
                done = subprocess.run(
                    command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
                )
                figures.append([float(value) for value in done.stdout.splitlines()[-1].split()])
            (ten, hundred), spread = np.mean(figures, axis=0), np.std(figures, axis=0, ddof=min(1, len(figures) - 1))
            each = ", ".join(f"{one:.2f} / {other:.2f}" for one, other in figures)
            print(
                f"{embedder:10} {name:7} R@10 {ten:.2f} ±{spread[0]:.2f}, "
                f"R@100 {hundred:.2f} ±{spread[1]:.2f}  ({each})",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
