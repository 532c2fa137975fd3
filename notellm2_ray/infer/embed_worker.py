"""The actor of bulk embedding: it holds one copy of the model and turns chunks of notes into files of vectors."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.infer.chunks import Chunk, read_chunk, read_ids
from notellm2_ray.infer.part_actors import PartActor
from notellm2_ray.infer.parts import FinishedPart, PartStore, quarantine_table

if TYPE_CHECKING:
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from notellm2_ray.models.embedder.preprocess import NoteFeatures, NotePreprocessor

    Features = Mapping[str, NoteFeatures]  # by vector column

_NOTES_PER_TASK = 16  # of a preprocessing thread: few enough to keep all threads busy, enough to be worth a task
_SWITCH_SECONDS = 2e-4  # for which a thread may keep the interpreter lock


@dataclass(frozen=True, kw_only=True)
class EmbeddedPart(FinishedPart):
    """A finished chunk's counts."""

    embedded: int
    quarantined: int

    @property
    def notes(self) -> int:
        """Notes that were handled."""
        return self.embedded + self.quarantined


def embedded_parts(output: Path) -> PartStore[EmbeddedPart]:
    """The parts of a job, one for each chunk: rows of ``note_id`` and the vector columns."""
    return PartStore(output, EmbeddedPart, compression="none")


class EmbedJob(NamedTuple):
    """What every actor of a job needs to know."""

    model: str
    output: str
    columns: Mapping[str, str]  # each vector column, with the input that fills it
    only_ids: str | None
    settings: EmbedSettings


class _Loaded(NamedTuple):
    encoder: NoteEncoder
    model_fingerprint: str
    only: frozenset[str] | None


class ChunkEmbedder(PartActor[Chunk, EmbeddedPart]):
    """Loads the model once, then embeds one chunk a call; two calls may run at once.

    While one call uses the model, the other reads, decodes and tokenises its chunk in ``preprocess_threads`` threads.
    How notes are batched depends only on their chunk, so a chunk's vectors are the same in every run.
    """

    part_type, finished_type = Chunk, EmbeddedPart

    def __init__(self, job: EmbedJob) -> None:
        self.job = job
        self.parts = embedded_parts(Path(job.output))
        self.threads = ThreadPoolExecutor(job.settings.preprocess_threads, thread_name_prefix="preprocess")
        # Torch is called from one thread only: OpenMP keeps a team of threads for each thread that calls it.
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.loading: Future[_Loaded] | None = None
        self.lock = threading.Lock()
        self.local = threading.local()

    def store(self, part: Chunk) -> PartStore[EmbeddedPart]:
        return self.parts

    def describe(self, part: Chunk) -> str:
        remedy = "if memory ran out, lower embed.actors, embed.chunk_rows or embed.batch_tokens"
        return f"{_rows_of(part)} ({remedy})"

    def make(self, part: Chunk) -> EmbeddedPart:
        # The model is loaded here and not in the constructor, so that an error is reported like any other of a chunk.
        with self.lock:
            self.loading = self.loading or self.model_thread.submit(_load, self.job)
        return self._embed(part, self.loading.result())

    def _embed(self, chunk: Chunk, loaded: _Loaded) -> EmbeddedPart:
        features, quarantined = self._features(read_chunk(chunk, loaded.only), loaded.encoder.preprocessor)
        ids, columns = [note_id for note_id, _ in features], self.job.columns
        by_column = {name: [note[name] for _, note in features] for name in columns}
        vectors = {
            name: self.model_thread.submit(encode, loaded.encoder, by_column[name], self.job.settings).result()
            for name in columns
        }
        finite = np.all([np.isfinite(matrix).all(axis=1) for matrix in vectors.values()], axis=0)
        if len(ids) > 1 and not finite.any():
            raise ModelError(
                f"{self.job.model}: all {len(ids)} vectors of chunk {chunk.part_id} are NaN or infinite: its weights "
                f"are damaged or overflow in embed.precision={self.job.settings.precision} (try fp32)"
            )
        quarantined += [(ids[row], "its vector is NaN or infinite") for row in np.flatnonzero(~finite)]
        table = _table([ids[row] for row in np.flatnonzero(finite)], {name: v[finite] for name, v in vectors.items()})
        done = EmbeddedPart(
            part_id=chunk.part_id,
            model_fingerprint=loaded.model_fingerprint,
            embedded=len(table),
            quarantined=len(quarantined),
        )
        return self.parts.commit(done, table, quarantine_table("notes", _rows_of(chunk), quarantined))

    def _features(
        self, notes: Sequence[Note], preprocessor: NotePreprocessor
    ) -> tuple[list[tuple[str, Features]], list[tuple[str, str]]]:
        """(note_id, features) of the notes that have them, (note_id, reason) of the others."""
        parts = [notes[start : start + _NOTES_PER_TASK] for start in range(0, len(notes), _NOTES_PER_TASK)]
        results = [
            one for part in self.threads.map(lambda part: self._preprocess(part, preprocessor), parts) for one in part
        ]
        good = [(note_id, result) for note_id, result in results if not isinstance(result, str)]
        return good, [(note_id, result) for note_id, result in results if isinstance(result, str)]

    def _preprocess(self, notes: Sequence[Note], preprocessor: NotePreprocessor) -> list[tuple[str, Features | str]]:
        # Two threads must not use one fast tokenizer at the same time, so each thread has its own.
        if not hasattr(self.local, "preprocessor"):
            self.local.preprocessor = copy.deepcopy(preprocessor)
        features = self.local.preprocessor.features
        results: list[tuple[str, Features | str]] = []
        for note in notes:
            try:
                results.append(
                    (note.note_id, {name: features(note, inputs) for name, inputs in self.job.columns.items()})
                )
            except DataError as error:
                results.append((note.note_id, str(error)))
        return results


def _rows_of(chunk: Chunk) -> str:
    return f"{chunk.file}, rows {chunk.start} to {chunk.start + chunk.rows}"


def _load(job: EmbedJob) -> _Loaded:
    import torch

    from notellm2_ray.models.embedder.encoder import NoteEncoder

    torch.set_num_threads(max(1, int(job.settings.cpus_per_actor)))
    keep_freed_memory()
    # The model's thread releases the interpreter lock at every operator. A preprocessing thread would then keep it for
    # 5 ms by default, which makes a small model many times slower.
    sys.setswitchinterval(_SWITCH_SECONDS)
    settings = job.settings
    encoder = NoteEncoder.from_pretrained(
        job.model, device=settings.device, precision=settings.precision, dimensions=settings.dimensions
    )
    only = frozenset(read_ids(job.only_ids).to_pylist()) if job.only_ids else None
    return _Loaded(encoder, encoder.fingerprint, only)


def encode(encoder: NoteEncoder, features: Sequence[NoteFeatures], settings: EmbedSettings) -> np.ndarray:
    """Unit vectors (N, D) of features, in their order; a vector that is not finite is left to the caller to judge.

    Raises:
        ModelError: GPU memory ran out.
    """
    import torch

    try:
        return encoder.encode_features(
            features, batch_tokens=settings.batch_tokens, max_batch_notes=settings.max_batch_notes
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"GPU memory ran out: lower embed.batch_tokens or embed.max_batch_notes ({error})") from error


def _table(ids: Sequence[str], vectors: Mapping[str, np.ndarray]) -> pa.Table:
    arrays = [pa.array(ids, pa.string())]
    for matrix in vectors.values():
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1]))
    return pa.table(arrays, names=["note_id", *vectors])
