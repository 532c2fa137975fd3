"""Training steps as the package takes them: float32 weights and moments, real lengths, and notes read meanwhile.

The step is the trainer's own (EmbedderStep around the network, autocast to bfloat16, the plain engine with AdamW), and
so is what prepares its batches. Notes have a JPEG of 640 x 480 pixels and texts of 10 to 400 words, half of them below
45; the packaged tokenizer cuts and counts them.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from _device import peak_gib, reset_peak, wait
from _flops import count
from PIL import Image

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.models.embedder.mlrm import NoteModel
from notellm2_ray.models.embedder.network import make_preprocessor
from notellm2_ray.models.llm import load_tokenizer
from notellm2_ray.models.packaged import PACKAGED, located
from notellm2_ray.train.batches import NotePreparer, PreparedNotes, prefetched
from notellm2_ray.train.engines import make_engine
from notellm2_ray.train.gradient_cache import begin_step
from notellm2_ray.train.objectives import loss_of
from notellm2_ray.train.step import EmbedderStep

NUM_NOTES = 2048
WORDS = ["harbour", "dawn", "fishing", "boats", "quiet", "water", "light", "red", "roof", "cat", "travel", "street"]


class Measured(NamedTuple):
    """One measurement."""

    notes_per_second: float
    flops_per_second: float
    peak_gib: float


def write_notes(path: Path) -> list[str]:
    """A store of notes with photographs and texts; returns their ids."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(32):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480))
        file = io.BytesIO()
        coarse.save(file, "JPEG", quality=85)
        images.append(file.getvalue())
    rows = []
    for number in range(NUM_NOTES):
        words = int(np.clip(draw.lognormal(3.8, 1.0), 10, 400))
        texts = {"title": " ".join(draw.choice(WORDS, 6)), "content": " ".join(draw.choice(WORDS, words))}
        row = {"note_id": f"n{number}", "topics": list(draw.choice(WORDS, 2)), "image": images[number % 32], **texts}
        rows.append({**row, "created_at": None})
    NoteStore.write(path, [pa.RecordBatch.from_pylist(rows, schema=NOTE_SCHEMA)])
    return [row["note_id"] for row in rows]


class Trainer:
    """The trainer of a network, without Ray."""

    def __init__(self, setup: Any, model: NoteModel, directory: Path, readers: int) -> None:
        self.setup, self.train = setup, TrainSettings(engine="plain", precision="bf16", learning_rate=3e-6)
        self.ids = write_notes(directory / "notes.arrow")
        preprocessor = make_preprocessor(setup.settings, load_tokenizer(located(PACKAGED, "llm")), model.tower, None)
        store = NoteStore(directory / "notes.arrow")
        self.prepare = NotePreparer(store, preprocessor, self.train.length_chunks, readers=readers)
        self.model = model.train()
        step = EmbedderStep(model, loss=loss_of(setup.settings, self.train), bf16=True)
        self.engine = make_engine(step, self.train, setup.device)

    def keys(self, pairs: int, number: int) -> list[str]:
        """The notes of a step."""
        draw = np.random.default_rng(number)
        return [self.ids[row] for row in draw.choice(len(self.ids), 2 * pairs, replace=False)]

    def step(self, notes: PreparedNotes) -> int:
        """Take a step; returns the floating-point operations of its notes, without padding."""
        positions = torch.arange(len(notes.note_ids), device=self.setup.device)
        out, update = begin_step(self.engine, notes, positions, cached=False)
        update(1.0)
        assert torch.isfinite(out.loss)
        tokens = [int(length) for group in notes.groups for length in group.attention_mask.sum(1)]
        setup = self.setup
        return sum(count(setup.settings, setup.llm_trained, setup.vision, length).training for length in tokens)

    def measure(self, pairs: int, steps: int, pipeline: bool, checkpointing: bool) -> Measured:
        """Whole steps on batches that are ready, or that are read and prepared meanwhile."""
        self.model.set_gradient_checkpointing(checkpointing)
        keys = [self.keys(pairs, number) for number in range(steps + 2)]
        given: Iterable[PreparedNotes] = prefetched(self.prepare, keys, 2)
        given = given if pipeline else _in_turn([self.prepare(one) for one in keys[:4]], len(keys))
        reset_peak(self.setup.device)
        began, work = 0.0, 0
        for number, notes in enumerate(given):
            done = self.step(notes)
            if number == 1:  # the first two steps are a warm-up
                wait(self.setup.device)
                began = time.perf_counter()
            elif number > 1:
                work += done
        wait(self.setup.device)
        seconds = time.perf_counter() - began
        return Measured(2 * pairs * steps / seconds, work / seconds, peak_gib(self.setup.device))


def _in_turn(batches: list[PreparedNotes], times: int) -> Iterator[PreparedNotes]:
    return (batches[number % len(batches)] for number in range(times))


def measure_training(setup: Any, model: NoteModel, steps: int) -> Iterator[tuple[str, Measured | None]]:
    """Each measurement with its name; None if memory does not suffice."""
    readers = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(setup, model, Path(directory), readers)
        try:
            for pairs in setup.train_pairs:
                for pipeline, again in ((False, False), (True, False), (False, True)):
                    source = f"read by {readers} process(es)" if pipeline else "ready"
                    what = f"{pairs} pairs, {source}, {'recomputing' if again else 'keeping'} activations"
                    try:
                        yield what, trainer.measure(pairs, steps, pipeline, again)
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
                        yield what, None
        finally:
            trainer.prepare.readers.close()
