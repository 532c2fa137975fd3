"""The deployment that turns notes into vectors: pre-processing in threads, the model in a thread of its own."""

from __future__ import annotations

import asyncio
import copy
import logging
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.schema import Note
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.micro_batch import MicroBatcher
from notellm2_ray.serve.plan import Plan, replica_options
from notellm2_ray.serve.workload import Workload

if TYPE_CHECKING:
    from notellm2_ray.models.preprocess import NoteFeatures

log = logging.getLogger("notellm2_ray.serve")

_INPUTS = {"embedding": "multimodal", "embedding_image": "image", "embedding_text": "text"}
_MOST_SECONDS = 10.0  # of notes in hand; serve.encode.timeout_seconds must leave room for them
_SWITCH_SECONDS = 2e-4  # as in bulk embedding: a thread that keeps the interpreter longer starves a small model


class Vectors(NamedTuple):
    """What became of a request's notes."""

    columns: dict[str, np.ndarray]  # (N, D) float32 each; rows of notes with a problem are NaN
    problems: dict[int, str]  # row to why it has no vector
    tokens: int  # that the notes took
    fingerprint: str  # of the model


Encoded = tuple[np.ndarray, str, int]  # (D,) vector, NaN where there is a problem; the problem; tokens


class Encoder:
    """One replica of the deployment.

    Notes of all requests are worked on in micro-batches: prepared in ``encode.threads`` threads, then put through the
    model in a thread of its own, while the next batch is prepared.
    """

    def __init__(self, plan: Plan) -> None:
        import torch

        from notellm2_ray.models.encoder import NoteEncoder

        settings = plan.serve.encode
        torch.set_num_threads(max(1, int(plan.serve.encoder.cpus)))
        keep_freed_memory()
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
        self.batcher = MicroBatcher(self._batch, most=settings.batch, size=len)

    async def encode(self, notes: Sequence[Note], columns: Sequence[str]) -> Vectors:
        """Vectors of N notes.

        Args:
            notes: to be encoded.
            columns: which of ``embedding``, ``embedding_image``, ``embedding_text``.

        Raises:
            OverloadedError: the notes in hand take as long as anybody should wait.
        """
        items = [(note, _INPUTS[column]) for column in columns for note in notes]
        step = self.settings.batch
        with self.workload.room_for(len(items)):
            parts = [items[start : start + step] for start in range(0, len(items), step)]
            done = [one for part in await asyncio.gather(*map(self.batcher.submit, parts)) for one in part]
        tokens = sum(tokens for _, _, tokens in done[: len(notes)])
        problems = {row % len(notes): problem for row, (_, problem, _) in enumerate(done) if problem}
        vectors = np.array([vector for vector, _, _ in done], np.float32)
        matrix = vectors.reshape(len(columns), len(notes), self.encoder.embedding_dim)
        return Vectors(dict(zip(columns, matrix, strict=True)), problems, tokens, self.fingerprint)

    def describe(self) -> dict[str, Any]:
        """What this replica runs."""
        return {"fingerprint": self.fingerprint, "dim": self.encoder.embedding_dim}

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    async def _batch(self, parts: list[list[tuple[Note, str]]]) -> list[list[Encoded]]:
        """Vector, problem and tokens of every item of every part."""
        items = [item for part in parts for item in part]
        self.figures.batch("encoder", len(items))
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        share = -(-len(items) // self.settings.threads)
        shares = [items[start : start + share] for start in range(0, len(items), share)]
        prepared = await asyncio.gather(*(loop.run_in_executor(self.threads, self._features, one) for one in shares))
        features = [one for share in prepared for one in share]
        self.workload.took("preprocess", time.perf_counter() - started, len(items))
        self.figures.took("preprocess", time.perf_counter() - started)
        encoded = iter(await loop.run_in_executor(self.model_thread, self._encode, features))
        return [[next(encoded) for _ in part] for part in parts]

    def _features(self, items: Sequence[tuple[Note, str]]) -> list[NoteFeatures | str]:
        """Features of notes, or why a note has none."""
        # A fast tokenizer must not be used by two threads at once: each thread has its own.
        if not hasattr(self.local, "preprocessor"):
            self.local.preprocessor = copy.deepcopy(self.encoder.preprocessor)
        found: list[NoteFeatures | str] = []
        for note, inputs in items:
            try:
                found.append(self.local.preprocessor.features(note, inputs))
            except DataError as error:
                found.append(str(error))
            except Exception:  # any: what a stranger's image makes a decoder raise must not fail others' notes
                log.exception("a note could not be prepared")
                found.append("the note cannot be read; the service's log says why")
        return found

    def _encode(self, features: Sequence[NoteFeatures | str]) -> list[Encoded]:
        started = time.perf_counter()
        good = [one for one in features if not isinstance(one, str)]
        vectors = iter(self._vectors(good))
        seconds = time.perf_counter() - started
        self.workload.took("model", seconds, len(good))
        self.figures.took("model", seconds)
        nothing = np.full(self.encoder.embedding_dim, np.nan, np.float32)
        encoded: list[Encoded] = []
        for one in features:
            if isinstance(one, str):
                encoded.append((nothing, one, 0))
                continue
            vector = next(vectors)
            problem = "" if np.isfinite(vector).all() else "the model gives no finite vector for it"
            encoded.append((vector, problem, one.num_tokens))
        return encoded

    def _vectors(self, features: Sequence[NoteFeatures]) -> np.ndarray:
        """(N, D); rows that are not finite stay so, for their caller alone to be told."""
        try:
            return self._forward(features)
        except DataError:
            return np.concatenate([self._one(one) for one in features])

    def _one(self, features: NoteFeatures) -> np.ndarray:
        try:
            return self._forward([features])
        except DataError:
            return np.full((1, self.encoder.embedding_dim), np.nan, np.float32)

    def _forward(self, features: Sequence[NoteFeatures]) -> np.ndarray:
        return self.encoder.encode_features(
            features, batch_tokens=self.settings.batch_tokens, max_batch_notes=self.settings.batch
        )


def _replica() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def encoder_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    options = replica_options(plan.serve.encoder, drain_seconds=plan.serve.drain_seconds)
    return serve.deployment(Encoder, name="Encoder", **options)
