"""Reading for bulk embedding: chunks of notes become features, in the model's own process or in others beside it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from notellm2_ray.core.errors import DataError, ModelError, NoteLLMError
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.infer.chunks import Chunk, read_chunk, read_ids
from notellm2_ray.infer.parts import MAX_ATTEMPTS, FinishedPart, PartStore

if TYPE_CHECKING:
    from notellm2_ray.models.embedder.kinds import Features, Preprocessor

HANDED = "features"  # column of what a reader hands to the model's process
READERS_PER_GPU_ACTOR = 16  # where embed.readers is null
_NOTES_PER_TASK = 16  # of a preprocessing thread: few enough to keep all threads busy, enough to be worth a task


class EmbedJob(NamedTuple):
    """What every actor of a job needs to know."""

    model: str
    output: str
    columns: Mapping[str, str]  # each vector column, with the input that fills it
    only_ids: str | None
    settings: EmbedSettings


class ReadNotes(NamedTuple):
    """The notes of a chunk, in its order."""

    features: list[tuple[str, Mapping[str, Features]]]  # note_id, and its features by vector column
    quarantined: list[tuple[str, str]]  # note_id, and the reason why it has none


class Reading:
    """Reads chunks, decodes and tokenises, in ``embed.preprocess_threads`` threads."""

    def __init__(self, job: EmbedJob, preprocessor: Preprocessor) -> None:
        self.job, self.preprocessor = job, preprocessor
        self.only = frozenset(read_ids(job.only_ids).to_pylist()) if job.only_ids else None
        self._threads = ThreadPoolExecutor(job.settings.preprocess_threads, thread_name_prefix="preprocess")
        self._local = threading.local()

    def __call__(self, chunk: Chunk) -> ReadNotes:
        """The features of a chunk's notes.

        Raises:
            DataError: the chunk's file is gone or damaged.
        """
        notes = read_chunk(chunk, self.only)
        parts = [notes[start : start + _NOTES_PER_TASK] for start in range(0, len(notes), _NOTES_PER_TASK)]
        read = ReadNotes([], [])
        for note_id, found in (one for part in self._threads.map(self._preprocess, parts) for one in part):
            if isinstance(found, str):
                read.quarantined.append((note_id, found))
            else:
                read.features.append((note_id, found))
        return read

    def _preprocess(self, notes: Sequence[Note]) -> list[tuple[str, Mapping[str, Features] | str]]:
        # Two threads must not use one fast tokenizer at the same time, so each thread has its own.
        if not hasattr(self._local, "preprocessor"):
            self._local.preprocessor = copy.deepcopy(self.preprocessor)
        features = self._local.preprocessor.features
        results: list[tuple[str, Mapping[str, Features] | str]] = []
        for note in notes:
            try:
                found = {name: features(note, inputs) for name, inputs in self.job.columns.items()}
                results.append((note.note_id, found))
            except DataError as error:
                results.append((note.note_id, str(error)))
        return results


class ChunkReader:
    """An actor without a model: it gives each chunk the column :data:`HANDED`."""

    def __init__(self, job: EmbedJob) -> None:
        self.job = job
        self.parts = PartStore(Path(job.output), FinishedPart)
        self.reading: Reading | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of :class:`~notellm2_ray.infer.chunks.Chunk`, to the same rows with what was read of each."""
        read = [pickle.dumps(self._read(Chunk(**row)), protocol=5) for row in batch.to_pylist()]
        return batch.append_column(HANDED, pa.array(read, pa.large_binary()))

    def _read(self, chunk: Chunk) -> ReadNotes | Exception:
        try:
            # Ray starts a dead actor again without a limit. What is counted here is removed at the end of the run.
            if self.parts.begin_attempt(f"{chunk.part_id}-read") > MAX_ATTEMPTS:
                raise ModelError(
                    f"{MAX_ATTEMPTS} readers died at {chunk.rows_of_file} (if memory ran out, lower embed.readers or "
                    "embed.chunk_rows). The finished parts are kept: run the same command again"
                )
            if self.reading is None:
                from notellm2_ray.models.embedder.encoder import load_preprocessor

                self.reading = Reading(self.job, load_preprocessor(self.job.model))
            return self.reading(chunk)
        except (NoteLLMError, OSError) as error:
            return error


def handed(features: Any) -> ReadNotes:
    """What a reader hands over.

    Args:
        features: a value of the column :data:`HANDED`.

    Raises:
        NoteLLMError, OSError: the error that stopped the reader.
    """
    read: ReadNotes | Exception = pickle.loads(features)
    if isinstance(read, Exception):
        raise read
    return read


def num_readers(settings: EmbedSettings, actors: int, chunks: int) -> int:
    """Processes that read for ``actors``; 0: the actors read for themselves. Ray must be connected."""
    if settings.readers is not None:
        return min(settings.readers, chunks)
    if not settings.gpus_per_actor:
        return 0
    import ray

    free = ray.cluster_resources().get("CPU", 0) - actors * settings.cpus_per_actor
    return max(0, min(int(free + 1e-6), READERS_PER_GPU_ACTOR * actors, chunks))
