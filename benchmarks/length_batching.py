"""Batches of notes of like length, against the published way: shuffled and padded to the longest note of the batch.

    python benchmarks/length_batching.py
    python benchmarks/length_batching.py --notes 1000 --repeats 1 --variants text_only

Both use the same model, the same notes of the world, the same number of notes in a batch, and one process. They take
turns, and the medians are compared. Only what batching changes is timed: collating and the forward pass, from features
that are ready. The gain depends on how much the prompts' lengths differ. So the notes are taken twice: with their whole
texts (the world's own distribution of lengths), and cut by the demo's settings, after which most are equally long.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from _measure import machine
from _world import SEED, build_tiny_embedder, write_world_notes

TEXTS = {
    "whole": {"max_content_words": 400, "max_title_words": 100, "max_body_tokens": 440},
    "cut": {},
}
NO_BUDGET = 10**9


def shuffled(count: int, batch_notes: int) -> list[np.ndarray]:
    """Row numbers of random batches."""
    order = np.random.default_rng(SEED).permutation(count)
    return [order[start : start + batch_notes] for start in range(0, count, batch_notes)]


def seconds_for(encoder, features: list, batches: Iterable[np.ndarray]) -> float:
    """Seconds to collate the batches and run the model over them."""
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        for rows in batches:
            encoder.model(encoder.preprocessor.collate([features[row] for row in rows]))
    return time.perf_counter() - started


def compare(model: Path, notes: list, arguments: argparse.Namespace, label: str) -> None:
    """Alternate the two ways on one model and print their medians and the ratio."""
    from notellm2_ray.models.embedder.encoder import NoteEncoder, batches_by_length

    encoder = NoteEncoder.from_pretrained(model)
    features = [encoder.preprocessor.features(note) for note in notes]
    lengths = np.array([item.num_tokens for item in features])
    ways = {
        "shuffled": shuffled(len(lengths), arguments.batch_notes),
        "by length": list(batches_by_length(lengths.tolist(), NO_BUDGET, arguments.batch_notes)),
    }
    seconds_for(encoder, features, ways["shuffled"][:2])  # warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, batches in ways.items():
            times[name].append(seconds_for(encoder, features, batches))
    rate = {name: len(lengths) / statistics.median(seconds) for name, seconds in times.items()}
    padding = {name: sum(lengths[b].max() * len(b) for b in batches) / lengths.sum() for name, batches in ways.items()}
    print(
        f"{label:22s} tokens {lengths.min()}-{lengths.max()} (mean {lengths.mean():.0f})   "
        + "   ".join(f"{name} {rate[name]:7.1f} notes/s, {padding[name]:.2f} x the tokens" for name in ways)
        + f"   RATIO {rate['by length'] / rate['shuffled']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=2000, help="notes of the world")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--batch-notes", type=int, default=64, help="notes in a batch, of both ways")
    parser.add_argument("--variants", nargs="+", default=["notellm2", "text_only"], help="embedders")
    arguments = parser.parse_args()
    import torch

    from notellm2_ray.core.schema import iter_notes

    torch.set_num_threads(arguments.threads)
    print(f"{machine()}; {arguments.notes} notes, {arguments.threads} torch thread(s), {arguments.batch_notes} a batch")
    with tempfile.TemporaryDirectory() as directory:
        source = write_world_notes(Path(directory) / "notes", arguments.notes, 1000)
        notes = list(iter_notes(pq.read_table(source)))
        for variant in arguments.variants:
            for name, changes in TEXTS.items():
                model = build_tiny_embedder(Path(directory), f"{variant}-{name}", variant=variant, **changes)
                compare(model, notes, arguments, f"{variant}, {name} texts")
    print("goal: at least 1.2 on the world's length distribution")


if __name__ == "__main__":
    main()
