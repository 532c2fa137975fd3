"""The actor of bulk embedding: it holds one copy of the model and turns chunks of notes into files of vectors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.infer.chunks import Chunk
from notellm2_ray.infer.embed_reading import HANDED, EmbedJob, Reading, ReadNotes, handed
from notellm2_ray.infer.part_actors import CALLS_AT_ONCE, PartActor
from notellm2_ray.infer.parts import FinishedPart, PartStore, quarantine_table

if TYPE_CHECKING:
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from notellm2_ray.models.embedder.kinds import Features

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


class Loaded(NamedTuple):
    """What an actor holds."""

    encoder: NoteEncoder
    model_fingerprint: str
    reading: Reading


class ChunkEmbedder(PartActor[Chunk, EmbeddedPart]):
    """Loads the model once, then embeds one chunk a call; two calls may run at once.

    While one call uses the model, the other reads, decodes and tokenises its chunk, or takes over what a reader
    (:class:`~notellm2_ray.infer.embed_reading.ChunkReader`) made of it. On a GPU both calls give it work, so that it
    has the next chunk's batches while the last vectors of a chunk are fetched and written.
    How notes are batched depends only on their chunk, so a chunk's vectors are the same in every run.
    """

    part_type, finished_type = Chunk, EmbeddedPart

    def __init__(self, job: EmbedJob) -> None:
        self.job = job
        self.parts = embedded_parts(Path(job.output))
        # On a CPU torch is called from one thread only: OpenMP keeps a team of threads for each thread that calls it.
        threads = CALLS_AT_ONCE if job.settings.device == "cuda" else 1
        self.model_threads = ThreadPoolExecutor(threads, thread_name_prefix="model")
        self.loading: Future[Loaded] | None = None
        self.lock = threading.Lock()
        if job.settings.device == "cuda":  # there readers are busy with the first chunks meanwhile
            self._start_loading()
        self.handed: dict[str, pa.Buffer] = {}  # by part, what readers made of the chunks of running calls

    def __call__(self, batch: pa.Table) -> pa.Table:
        if HANDED not in batch.column_names:
            return super().__call__(batch)
        for part_id, features in zip(batch["part_id"].to_pylist(), batch[HANDED], strict=True):
            self.handed[part_id] = features.as_buffer()
        return super().__call__(batch.drop_columns([HANDED]))

    def store(self, part: Chunk) -> PartStore[EmbeddedPart]:
        return self.parts

    def describe(self, part: Chunk) -> str:
        remedy = "if memory ran out, lower embed.actors, embed.chunk_rows or embed.batch_tokens"
        return f"{part.rows_of_file} ({remedy})"

    def make(self, part: Chunk) -> EmbeddedPart:
        # An error of loading is reported like any other of a chunk.
        return self._embed(part, self._start_loading().result())

    def load(self) -> Loaded:
        """The model, on its device."""
        return _load(self.job)

    def _start_loading(self) -> Future[Loaded]:
        with self.lock:
            self.loading = self.loading or self.model_threads.submit(self.load)
            return self.loading

    def _embed(self, chunk: Chunk, loaded: Loaded) -> EmbeddedPart:
        features, quarantined = self._read(chunk, loaded)
        ids, columns = [note_id for note_id, _ in features], self.job.columns
        by_column = {name: [note[name] for _, note in features] for name in columns}
        vectors = {
            name: self.model_threads.submit(encode, loaded.encoder, by_column[name], self.job.settings).result()
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
        return self.parts.commit(done, table, quarantine_table("notes", chunk.rows_of_file, quarantined))

    def _read(self, chunk: Chunk, loaded: Loaded) -> ReadNotes:
        features = self.handed.pop(chunk.part_id, None)
        return loaded.reading(chunk) if features is None else handed(features)


def _load(job: EmbedJob) -> Loaded:
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
    return Loaded(encoder, encoder.fingerprint, Reading(job, encoder.preprocessor))


def encode(encoder: NoteEncoder, features: Sequence[Features], settings: EmbedSettings) -> np.ndarray:
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
