"""The deployment that turns notes into vectors: pre-processing in threads, the model in a thread of its own."""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import Note
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.plan import Plan, replica_options
from notellm2_ray.serve.workload import Workload

if TYPE_CHECKING:
    from notellm2_ray.models.preprocess import NoteFeatures

_INPUTS = {"embedding": "multimodal", "embedding_image": "image", "embedding_text": "text"}
_MOST_SECONDS = 10.0  # of notes in hand; serve.encode.timeout_seconds must leave room for them
_SWITCH_SECONDS = 2e-4  # as in bulk embedding: a thread that keeps the interpreter longer starves a small model


class Vectors(NamedTuple):
    """What became of a request's notes."""

    columns: dict[str, np.ndarray]  # (N, D) float32 each; rows of notes with a problem are NaN
    problems: dict[int, str]  # row to why it has no vector
    tokens: int  # that the notes took
    fingerprint: str  # of the model


class EncoderParts:
    """What a replica of the encoder does; :func:`encoder_deployment` adds Serve's micro-batching."""

    def __init__(self, plan: Plan) -> None:
        import torch

        from notellm2_ray.models.encoder import NoteEncoder

        settings = plan.serve.encode
        torch.set_num_threads(max(1, int(plan.serve.encoder.cpus)))
        sys.setswitchinterval(_SWITCH_SECONDS)
        device = "cuda" if plan.serve.encoder.gpus else "cpu"
        self.settings = settings
        self.encoder = NoteEncoder.from_pretrained(plan.model, device=device, precision=settings.precision)
        self.fingerprint = self.encoder.fingerprint
        self.threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="preprocess")
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.local = threading.local()
        self.workload = Workload(_MOST_SECONDS)
        self.figures = Figures(f"encoder-{_replica()}")

    async def preprocess(self, notes: Sequence[Note], inputs: str) -> list[NoteFeatures | str]:
        """Features of notes, or why a note has none."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        features = await loop.run_in_executor(self.threads, self._features, notes, inputs)
        self.figures.took("preprocess", time.perf_counter() - started)
        return features

    async def forward(self, requests: Sequence[Sequence[NoteFeatures]]) -> list[np.ndarray]:
        """(N_i, D) vectors of the requests' features, all of them in one go through the model."""
        started = time.perf_counter()
        features = [one for request in requests for one in request]
        vectors = await asyncio.get_running_loop().run_in_executor(self.model_thread, self._encode, features)
        self.figures.took("model", time.perf_counter() - started)
        self.figures.batch("encoder", len(features))
        ends = np.cumsum([len(request) for request in requests])[:-1]
        return np.split(vectors, ends)

    def _features(self, notes: Sequence[Note], inputs: str) -> list[NoteFeatures | str]:
        # A fast tokenizer must not be used by two threads at once: each thread has its own.
        if not hasattr(self.local, "preprocessor"):
            self.local.preprocessor = copy.deepcopy(self.encoder.preprocessor)
        started = time.perf_counter()
        found: list[NoteFeatures | str] = []
        for note in notes:
            try:
                found.append(self.local.preprocessor.features(note, inputs))
            except DataError as error:
                found.append(str(error))
        self.workload.took("preprocess", (time.perf_counter() - started) / self.settings.threads, len(notes))
        return found

    def _encode(self, features: Sequence[NoteFeatures]) -> np.ndarray:
        """Vectors; rows that are not finite stay so, for their caller alone to be told."""
        started = time.perf_counter()
        try:
            return self._batches(features)
        except DataError:
            return np.concatenate([self._one(one) for one in features])
        finally:
            self.workload.took("model", time.perf_counter() - started, len(features))

    def _one(self, features: NoteFeatures) -> np.ndarray:
        try:
            return self._batches([features])
        except DataError:
            return np.full((1, self.encoder.embedding_dim), np.nan, np.float32)

    def _batches(self, features: Sequence[NoteFeatures]) -> np.ndarray:
        return self.encoder.encode_features(
            features, batch_tokens=self.settings.batch_tokens, max_batch_notes=self.settings.batch
        )


def _replica() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def encoder_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    settings = plan.serve.encode

    class Encoder(EncoderParts):
        """Vectors of notes."""

        @serve.batch(
            max_batch_size=settings.batch,
            batch_wait_timeout_s=settings.wait_ms / 1000,
            batch_size_fn=lambda requests: sum(map(len, requests)),
        )
        async def forward_together(self, requests: list[Any]) -> list[Any]:
            return await self.forward(requests)

        async def encode(self, notes: Sequence[Note], columns: Sequence[str]) -> Vectors:
            """Vectors of N notes.

            Args:
                notes: to be encoded.
                columns: which of ``embedding``, ``embedding_image``, ``embedding_text``.

            Raises:
                OverloadedError: the notes in hand take as long as anybody should wait.
            """
            with self.workload.room_for(len(notes) * len(columns)):
                return await self._vectors(notes, columns)

        async def _vectors(self, notes: Sequence[Note], columns: Sequence[str]) -> Vectors:
            found: dict[str, np.ndarray] = {}
            problems: dict[int, str] = {}
            tokens = 0
            for column in columns:
                features = await self.preprocess(notes, _INPUTS[column])
                problems |= {row: one for row, one in enumerate(features) if isinstance(one, str)}
                rows = [row for row, one in enumerate(features) if not isinstance(one, str)]
                matrix = np.full((len(notes), self.encoder.embedding_dim), np.nan, np.float32)
                # A request larger than a micro-batch goes in parts: Serve's batcher takes no item beyond its size.
                for start in range(0, len(rows), settings.batch):
                    part = rows[start : start + settings.batch]
                    matrix[part] = await self.forward_together([features[row] for row in part])
                for row in np.flatnonzero(~np.isfinite(matrix).all(axis=1)):
                    problems.setdefault(int(row), "the model gives no finite vector for it")
                found[column] = matrix
                if column == columns[0]:
                    tokens = sum(one.num_tokens for one in features if not isinstance(one, str))
            return Vectors(found, problems, tokens, self.fingerprint)

        def describe(self) -> dict[str, Any]:
            """What this replica runs, and its figures."""
            return {"fingerprint": self.fingerprint, "dim": self.encoder.embedding_dim}

        def report(self) -> list[Family]:
            """This replica's figures."""
            return self.figures.snapshot()

    return serve.deployment(
        Encoder, name="Encoder", **replica_options(plan.serve.encoder, drain_seconds=plan.serve.drain_seconds)
    )
