"""A small training set with tiny random models, and training step by step without Ray, for the tests here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import NEGATIVES, NOTE_SCHEMA, PAIR_SCHEMA, Note
from notellm2_ray.core.settings import ModelSettings, TrainSettings
from tests.support import tiny_models

NUM_NOTES = 24


def write(directory: Path, num_pairs: int = 40) -> Path:
    """models (llm, clip) and pairs (train, valid, train_notes) under ``directory``."""
    tiny_models.save_llm(directory / "llm")
    tiny_models.save_clip(directory / "clip")
    pairs = directory / "pairs"
    pairs.mkdir()
    NoteStore.write(pairs / "train_notes.arrow", [as_batch(notes())])
    rng = np.random.default_rng(0)
    write_pairs(pairs / "train.parquet", rng, num_pairs)
    write_pairs(pairs / "valid.parquet", rng, 10)
    return directory


def notes() -> list[Note]:
    return tiny_models.notes(NUM_NOTES, without_image=(3, 7, 8))


def as_batch(notes: list[Note]) -> pa.RecordBatch:
    rows = [{**note._asdict(), "topics": list(note.topics), "created_at": None} for note in notes]
    return pa.RecordBatch.from_pylist(rows, schema=NOTE_SCHEMA)


def write_pairs(path: Path, rng: np.random.Generator, num_pairs: int) -> None:
    chosen = [rng.choice(NUM_NOTES, 2, replace=False) for _ in range(num_pairs)]
    rows = [{"query_id": f"n{query}", "target_id": f"n{target}", "score": 1.0} for query, target in chosen]
    # Up to three hard negatives; for some pairs fewer than a step draws.
    lists = [[f"n{(query + 5 * step) % NUM_NOTES}" for step in range(1, 1 + query % 4)] for query, _ in chosen]
    table = pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)
    pq.write_table(table.append_column(NEGATIVES, pa.array(lists, pa.list_(pa.string()))), path)


def train_settings(**changes: object) -> TrainSettings:
    small = {
        "engine": "plain",
        "batch_pairs": 8,
        "epochs": 4,
        "learning_rate": 1e-3,
        "epsilon": 1e-6,  # some gradients are zero but for rounding (keys' biases), which Adam would blow up
        "precision": "fp32",
        "length_chunks": 2,
        "prefetch_batches": 1,
        "validate_every_steps": 5,
        "checkpoint_every_steps": 3,
    }
    return TrainSettings(**{**small, **changes})


def model_settings(dropout: float = 0.0, **changes: object) -> ModelSettings:
    made = tiny_models.settings(**changes)
    return made.model_copy(update={"qformer": made.qformer.model_copy(update={"dropout": dropout})})


class Run:
    """The parts of a training run on this rank."""

    def __init__(self, directory: Path, settings: TrainSettings, model: ModelSettings | None = None) -> None:
        from notellm2_ray.models.embedder.build import build_encoder
        from notellm2_ray.train import distributed
        from notellm2_ray.train.batches import NotePreparer
        from notellm2_ray.train.engines import make_engine
        from notellm2_ray.train.objectives import loss_of
        from notellm2_ray.train.sampler import Pairs, PairSampler
        from notellm2_ray.train.step import EmbedderStep

        self.settings, model = settings, model or model_settings()
        encoder = build_encoder(model, 1, llm_path=str(directory / "llm"), vision_path=str(directory / "clip"))
        pairs = Pairs(directory / "pairs" / "train.parquet")
        ranks = distributed.rank(), distributed.world_size()
        self.sampler = PairSampler(pairs, settings.batch_pairs, 1, *ranks, settings.hard_negatives)
        store = NoteStore(directory / "pairs" / "train_notes.arrow")
        self.prepare = NotePreparer(
            store,
            encoder.preprocessor,
            settings.length_chunks,
            max_notes=settings.cached_notes_per_pass,
            max_tokens=settings.cached_tokens_per_pass,
        )
        self.loss = loss_of(model, settings)
        self.module = EmbedderStep(encoder.model, loss=self.loss, bf16=settings.precision == "bf16")
        self.module.train()
        self.engine = make_engine(self.module, settings, torch.device("cpu"))

    def forward(self, step: int) -> Any:
        """The StepOutput of a step."""
        return self._begin(step)[0]

    def step(self, step: int, total: int = 20) -> float:
        """Take a step; the loss of the whole batch."""
        from notellm2_ray.train.distributed import mean_over_ranks
        from notellm2_ray.train.schedule import learning_rate_factor

        torch.manual_seed(stream_seed(1, step))
        out, update = self._begin(step)
        update(learning_rate_factor(step, total, 0.1))
        return mean_over_ranks(out.loss)

    def _begin(self, step: int) -> tuple[Any, Callable[[float], None]]:
        from notellm2_ray.train.gradient_cache import begin_step

        batch = self.sampler[step]
        notes, keys = self.prepare(batch.note_ids), torch.from_numpy(batch.note_keys)
        return begin_step(self.engine, notes, keys, batch.negatives, cached=self.settings.caches_gradients)
