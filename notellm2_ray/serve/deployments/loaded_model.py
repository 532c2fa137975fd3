"""A loaded embedder that embeds the notes of requests in micro-batches."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.serve import EncodeSettings
from notellm2_ray.live.rows import LiveNote
from notellm2_ray.serve.deployments.micro_batch import MicroBatcher
from notellm2_ray.serve.deployments.workload import Workload
from notellm2_ray.serve.figures import Figures

if TYPE_CHECKING:
    from notellm2_ray.models.embedder.preprocess import NoteFeatures

log = logging.getLogger("notellm2_ray.serve")

_MOST_SECONDS = 10.0  # of work in hand; must be less than serve.encode.timeout_seconds

INPUTS = {"embedding": "multimodal", "embedding_image": "image", "embedding_text": "text"}

Encoded = tuple[np.ndarray, str, int]  # (D,) vector, NaN if there is a problem; the problem or ""; tokens


class Vectors(NamedTuple):
    """The vectors of a request's N notes."""

    columns: dict[str, np.ndarray]  # (N, D) float32 each; NaN for notes with a problem
    problems: dict[int, str]  # row to the reason why it has no vector
    tokens: int  # of all notes
    fingerprint: str  # of the model
    lengths: tuple[int, ...] = ()  # that vectors of the model can have, D first

    def live_notes(self, notes: Sequence[Note], created: Mapping[str, datetime | None]) -> list[LiveNote]:
        """The notes that have a vector, ready to be written.

        Args:
            notes: the N notes.
            created: creation time by note id.
        """
        own, *others = self.columns
        found = []
        for row, note in enumerate(notes):
            if row not in self.problems:
                further: dict[str, np.ndarray | None] = {name: self.columns[name][row] for name in others}
                if note.image is None and "embedding_image" in further:
                    further["embedding_image"] = None  # the model's vector of a missing image has no meaning
                vector = self.columns[own][row]
                found.append(LiveNote(note.note_id, vector, *note[1:], created[note.note_id], further))
        return found


class Workers:
    """Threads and figures that the models of a replica share.

    A single thread runs all models: two at once would only share the device.

    Args:
        settings: of micro-batches.
        precision: of the models' weights.
        figures: of the replica.
        dimensions: length to which vectors are cut; None: they are whole.
    """

    def __init__(
        self, settings: EncodeSettings, precision: str, figures: Figures, dimensions: int | None = None
    ) -> None:
        self.settings, self.precision, self.figures, self.dimensions = settings, precision, figures, dimensions
        self.preprocess = ThreadPoolExecutor(settings.threads, thread_name_prefix="preprocess")
        self.model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.workload = Workload(_MOST_SECONDS)


class LoadedModel:
    """A model and its micro-batches.

    A batch is preprocessed in ``encode.threads`` threads, then runs through the model in another thread while the next
    batch is preprocessed.

    Attributes:
        path: of the model's directory.
        fingerprint: of the model.
        files: fingerprint of its files before they were read.
        used: when it was last used (``time.monotonic``).
        wanted: when it was last served or to be served next (``time.monotonic``).
    """

    def __init__(self, path: Path, device: str, workers: Workers, wanted: str | None = None) -> None:
        """Load the model.

        Args:
            wanted: its fingerprint when the served vectors were made, maybe on another kind of device. With
                ``workers.precision`` of ``auto`` the model is loaded in the precision that gives it. If none does, the
                model is another one, as its fingerprint then tells.
        """
        self.path, self.workers, self.settings = path, workers, workers.settings
        self.files = files_fingerprint(str(path))
        for precision in _precisions(workers.precision, device):
            self._load(device, precision)
            if wanted in (None, self.fingerprint):
                break
        self.used = self.wanted = time.monotonic()
        self._local = threading.local()
        self._batcher = MicroBatcher(self._batch, most=workers.settings.batch, size=len)

    def _load(self, device: str, precision: str) -> None:
        from notellm2_ray.models.embedder.encoder import NoteEncoder

        self.encoder = NoteEncoder.from_pretrained(
            self.path, device=device, precision=precision, dimensions=self.workers.dimensions
        )
        self.fingerprint = self.encoder.fingerprint

    async def encode(self, notes: Sequence[Note], columns: Sequence[str]) -> Vectors:
        """Vectors of N notes.

        Args:
            notes: to be embedded.
            columns: which of ``embedding``, ``embedding_image``, ``embedding_text``.

        Raises:
            OverloadedError: the notes in hand would take too long.
        """
        self.used = time.monotonic()
        items = [(note, INPUTS[column]) for column in columns for note in notes]
        step = self.settings.batch
        with self.workers.workload.room_for(len(items)):
            parts = [items[start : start + step] for start in range(0, len(items), step)]
            done = [one for part in await asyncio.gather(*map(self._batcher.submit, parts)) for one in part]
        tokens = sum(tokens for _, _, tokens in done[: len(notes)])
        problems = {row % len(notes): problem for row, (_, problem, _) in enumerate(done) if problem}
        vectors = np.array([vector for vector, _, _ in done], np.float32)
        matrix = vectors.reshape(len(columns), len(notes), self.encoder.embedding_dim)
        by_column = dict(zip(columns, matrix, strict=True))
        return Vectors(by_column, problems, tokens, self.fingerprint, self.encoder.lengths)

    async def _batch(self, parts: list[list[tuple[Note, str]]]) -> list[list[Encoded]]:
        """Vector, problem and tokens of each item of each part."""
        items = [item for part in parts for item in part]
        self.workers.figures.batch("encoder", len(items))
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        share = -(-len(items) // self.settings.threads)
        shares = [items[start : start + share] for start in range(0, len(items), share)]
        prepared = await asyncio.gather(
            *(loop.run_in_executor(self.workers.preprocess, self._features, one) for one in shares)
        )
        features = [one for share in prepared for one in share]
        self.workers.workload.took("preprocess", time.perf_counter() - started, len(items))
        self.workers.figures.took("preprocess", time.perf_counter() - started)
        encoded = iter(await loop.run_in_executor(self.workers.model, self._encode, features))
        return [[next(encoded) for _ in part] for part in parts]

    def _features(self, items: Sequence[tuple[Note, str]]) -> list[NoteFeatures | str]:
        """Features of each note, or the reason why there are none."""
        # Two threads must not use one fast tokenizer at the same time, so each thread has its own.
        if not hasattr(self._local, "preprocessor"):
            self._local.preprocessor = copy.deepcopy(self.encoder.preprocessor)
        found: list[NoteFeatures | str] = []
        for note, inputs in items:
            try:
                found.append(self._local.preprocessor.features(note, inputs))
            except DataError as error:
                found.append(str(error))
            except Exception:  # any kind: an error of the image decoder must not fail the other notes of the batch
                log.exception("a note could not be preprocessed")
                found.append("the note cannot be read; the service's log says why")
        return found

    def _encode(self, features: Sequence[NoteFeatures | str]) -> list[Encoded]:
        started = time.perf_counter()
        good = [one for one in features if not isinstance(one, str)]
        settings = self.settings
        vectors = iter(
            self.encoder.encode_features(good, batch_tokens=settings.batch_tokens, max_batch_notes=settings.batch)
        )
        seconds = time.perf_counter() - started
        self.workers.workload.took("model", seconds, len(good))
        self.workers.figures.took("model", seconds)
        nothing = np.full(self.encoder.embedding_dim, np.nan, np.float32)
        encoded: list[Encoded] = []
        for one in features:
            if isinstance(one, str):
                encoded.append((nothing, one, 0))
                continue
            vector = next(vectors)
            problem = "" if np.isfinite(vector).all() else "the model's vector for this note is not finite"
            encoded.append((vector, problem, one.num_tokens))
        return encoded


def _precisions(given: str, device: str) -> tuple[str, ...]:
    """The precisions that the vectors may have been made in, the likeliest first."""
    from notellm2_ray.models.device import inference_precision

    first = inference_precision(given, device)
    return (first,) if given != "auto" else (first, "fp32" if first == "bf16" else "bf16")
