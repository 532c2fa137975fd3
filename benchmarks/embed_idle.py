"""How long a device waits for its notes in bulk embedding: with readers in other processes, and with threads.

    python benchmarks/embed_idle.py                     # a device 0.7 times as fast as one process reads
    python benchmarks/embed_idle.py --speeds 0.7 1.4    # and one for two processes; needs three free cores

The whole pipeline runs, through Ray: Parquet, decoding of JPEGs, tokenising, batches, vectors, parts, table. Only the
forward pass is replaced, by a device that takes a given time for each note and, as a GPU does, works while the process
goes on. It is idle while it has no batch. Its idle share is counted from its first batch to its last, and its speed is
given relative to what one process reads and tokenises here, so that the goal of 5% does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from _measure import machine
from _photos import write_photos
from _world import build_tiny_embedder

from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.infer import embed
from notellm2_ray.infer.chunks import list_note_files, plan_chunks
from notellm2_ray.infer.embed_reading import EmbedJob, Reading
from notellm2_ray.infer.embed_worker import ChunkEmbedder, Loaded
from notellm2_ray.models.embedder.encoder import NoteEncoder, load_preprocessor

GOAL = 0.05


class Device:
    """Works on one batch after another, at a given rate; says how long it had none."""

    def __init__(self, notes_per_second: float, log: Path) -> None:
        self.rate, self.log, self.lock = notes_per_second, log, threading.Lock()
        self.first = self.free = self.idle = 0.0

    def start(self, notes: int) -> float:
        """Queue a batch; returns when it will be over."""
        with self.lock:
            now = time.monotonic()
            self.first = self.first or now
            self.idle += max(0.0, now - self.free) if self.free else 0.0
            self.free = max(now, self.free) + notes / self.rate
            self.log.write_text(json.dumps({"idle": self.idle, "seconds": self.free - self.first}))
            return self.free


class PacedEncoder(NoteEncoder):
    """An encoder on a :class:`Device`; its batches are made as for a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]

    def __init__(self, encoder: NoteEncoder, paced: Device) -> None:
        super().__init__(encoder.model, encoder.preprocessor)
        self.paced = paced

    def launch(self, features, length):
        self.preprocessor.collate(features)
        return self.paced.start(len(features)), (len(features), length)

    def fetch(self, launched):
        end, shape = launched
        time.sleep(max(0.0, end - time.monotonic()))
        return np.full(shape, shape[1] ** -0.5, np.float32)


def paced_embedder(rate: float, log: Path) -> type[ChunkEmbedder]:
    """The actor, on a device of ``rate`` notes/s."""

    class PacedEmbedder(ChunkEmbedder):
        def load(self) -> Loaded:
            torch.set_num_threads(1)
            encoder = NoteEncoder.from_pretrained(self.job.model)
            return Loaded(PacedEncoder(encoder, Device(rate, log)), "paced", Reading(self.job, encoder.preprocessor))

    return PacedEmbedder


def reading_rate(model: Path, notes: Path, settings: EmbedSettings) -> float:
    """Notes that one process reads, decodes and tokenises in a second."""
    job = EmbedJob(str(model), "", {"embedding": "multimodal"}, None, settings)
    reading = Reading(job, load_preprocessor(model))
    chunks = plan_chunks(list_note_files(notes), settings.chunk_rows, "").chunks
    reading(chunks[0])
    started = time.perf_counter()
    read = sum(len(reading(chunk).features) for chunk in chunks[1:4])
    return read / (time.perf_counter() - started)


def idle_share(model: Path, notes: Path, settings: EmbedSettings, rate: float) -> float:
    """Share of the time that the device had no batch, with the whole pipeline before it."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "device.json"
        embed.ChunkEmbedder = paced_embedder(rate, log)  # type: ignore[misc]
        embed.embed_notes(model, notes, Path(directory) / "out", settings)
        seen = json.loads(log.read_text())
    return seen["idle"] / seen["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=int, default=6000)
    parser.add_argument("--side", type=int, default=768, help="of the JPEGs, in pixels")
    parser.add_argument("--chunk-rows", type=int, default=128)
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.7], help="relative to one reading process")
    arguments = parser.parse_args()
    import ray

    # Logical resources: the device that the actor asks for is not there.
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, object_store_memory=2**29)
    with tempfile.TemporaryDirectory() as directory:
        notes = write_photos(Path(directory) / "notes.parquet", arguments.notes, arguments.side, arguments.chunk_rows)
        model = build_tiny_embedder(Path(directory))
        settings = EmbedSettings(gpus_per_actor=1, chunk_rows=arguments.chunk_rows)
        alone = reading_rate(model, notes, settings)
        print(f"{machine()}; {arguments.notes} notes, JPEGs of {arguments.side} pixels")
        print(f"one process reads and tokenises {alone:.0f} notes/s")
        for speed in arguments.speeds:
            workers = int(np.ceil(speed))
            ways = {"threads": {"readers": 0, "preprocess_threads": workers}, "readers": {"readers": workers}}
            for way, changes in ways.items():
                share = idle_share(model, notes, settings.model_copy(update=changes), speed * alone)
                print(
                    f"device of {speed * alone:5.0f} notes/s, {workers} {way:7s}: idle {share:6.1%} "
                    f"(goal of readers: below {GOAL:.0%})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
