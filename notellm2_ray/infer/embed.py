"""Bulk embedding: a Parquet table of notes becomes the embedding table, computed by a pool of Ray Data actors."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from notellm2_ray.core import errors
from notellm2_ray.core.config import shaping
from notellm2_ray.core.devices import batch_notes
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.core.settings.retrieval import Inputs
from notellm2_ray.infer.chunks import Chunk, ChunkPlan, list_note_files, plan_chunks, read_ids
from notellm2_ray.infer.embed_reading import ChunkReader, EmbedJob, num_readers
from notellm2_ray.infer.embed_worker import ChunkEmbedder, EmbeddedPart, embedded_parts
from notellm2_ray.infer.part_actors import make_parts
from notellm2_ray.infer.parts import PartStore, require_one_model
from notellm2_ray.infer.resources import check_readers, check_resources

log = logging.getLogger("notellm2_ray")

_SHAPING = ("batch_tokens", "precision", "dimensions")  # settings that a vector depends on


def embed_notes(
    model: Path | str,
    notes: Path | str,
    output: Path,
    settings: EmbedSettings,
    *,
    inputs: Sequence[str] = ("multimodal",),
    only_ids: Path | None = None,
) -> dict[str, Any]:
    """Embed a table of notes into the Lance table ``<output>.lance``, in the order of the input.

    The notes are cut into chunks (:mod:`~notellm2_ray.infer.chunks`), and each chunk becomes one resumable part
    (:mod:`~notellm2_ray.infer.parts`) under ``output/parts``. A later run of the same job skips the parts that are
    there, so a killed actor or driver costs only the chunks that were being embedded. The table of a run that was
    stopped and continued equals that of an undisturbed run, bit for bit. It is written in a single commit when all
    parts are there.

    Ray Data's own checkpoints (``ray.data.checkpoint``) are not used: they commit whole output files, and Ray joins
    small rows into few files. Measured with Ray 2.60 on 24,000 to 60,000 such rows, a job wrote a single file and lost
    all of its work at every kill.

    Ray must be connected. On several machines ``notes``, ``model`` and ``output`` must be on storage that all share.

    Args:
        model: directory of a :class:`~notellm2_ray.models.embedder.encoder.NoteEncoder`.
        notes: Parquet file, directory, glob or object-store URI with the columns of ``NOTE_SCHEMA``; ``created_at`` and
            further columns are not read.
        output: directory for the parts; made if it does not exist.
        inputs: which parts of each note the model sees (Table 3): ``multimodal``, ``image``, ``text``. The column
            ``embedding`` holds ``multimodal`` if it is given, otherwise the first; the others go to
            ``embedding_image`` and ``embedding_text``.
        only_ids: Parquet file with a ``note_id`` column: embed only these.

    Returns:
        Counts for the manifest: notes, embedded, quarantined, unknown_ids, chunks, chunks_reused,
        model_fingerprint, table_rows, startup_seconds (until the first chunk was done), embed_seconds (until the last
        was), table_seconds.

    Raises:
        ConfigError: the actors do not fit into the cluster, or ``inputs`` is not valid.
        DataError: there is nothing to embed, an input file is damaged or lacks a column, an id is repeated, or more
            notes get no usable vector than ``max_bad_share`` allows.
        ModelError: the model cannot be loaded, gives only NaN, or its actors keep dying.
    """
    output = Path(output).absolute()
    columns = inputs_by_column(inputs)
    job = EmbedJob(str(Path(model).absolute()), str(output), columns, _absolute(only_ids), settings)
    plan = plan_job(job, notes)
    store, part_ids = embedded_parts(output), [chunk.part_id for chunk in plan.chunks]
    if removed := store.clear_leftovers(part_ids):
        log.warning("embed-notes: removed %d finished part(s) of another model, other settings or other notes", removed)
    finished = {part_id: store.finished(part_id) for part_id in part_ids}
    done = [entry for entry in finished.values() if entry is not None]
    todo = [chunk for chunk in plan.chunks if finished[chunk.part_id] is None]
    reused = len(done)
    before = sum(entry.notes for entry in done)
    with Progress("embed-notes", "notes", plan.notes, before=before, waits_for="the first chunk") as progress:
        if todo:
            with closing(run_chunks(job, todo)) as results:  # on an error: ends the actors
                for entry in results:
                    done.append(entry)
                    progress.add(entry.notes)
                    _check_bad_share(done, plan, store, settings)
    _check_bad_share(done, plan, store, settings)
    store.clear_leftovers(part_ids)  # half-written files of actors that died in this run
    started = time.monotonic()
    rows = _write_table(store, plan, done)
    return {
        **_counts(done, plan, reused),
        "startup_seconds": progress.startup_seconds,
        "embed_seconds": progress.seconds,
        "table_rows": rows,
        "table_seconds": round(time.monotonic() - started, 3),
    }


def inputs_by_column(inputs: Sequence[str]) -> dict[str, str]:
    """Each vector column of the table, with the input that fills it; ``embedding`` comes first.

    Raises:
        ConfigError: an input is unknown or repeated, or there is none.
    """
    known = get_args(Inputs)
    if not inputs or len(set(inputs)) != len(inputs) or not set(inputs) <= set(known):
        raise errors.ConfigError(
            f"inputs must be some of {', '.join(known)}, each once; got {', '.join(inputs) or 'none'}"
        )
    main = "multimodal" if "multimodal" in inputs else inputs[0]
    return {"embedding": main, **{f"embedding_{name}": name for name in known if name in inputs and name != main}}


def plan_job(job: EmbedJob, notes: Path | str) -> ChunkPlan:
    """The chunks of a job. Their ids change with the model, the notes and everything else that shapes a vector."""
    only = None if job.only_ids is None else read_ids(job.only_ids)
    how = {name: value for name, value in shaping(job.settings).items() if name in _SHAPING}
    # A finished table stays valid with batches of another size: rounding is all that differs. The parts of a stopped
    # run do not, because they shall make the table that an undisturbed run makes.
    if how["precision"] == "auto" and job.settings.device == "cpu":
        how["precision"] = "fp32"
    how["max_batch_notes"] = batch_notes(job.settings.max_batch_notes, job.settings.device)
    chosen = None if only is None else fingerprint(sorted(only.to_pylist()))
    made_by = fingerprint(_model_files(Path(job.model)), dict(job.columns), how, chosen)
    text = str(notes)
    files = list_note_files(text if "://" in text else Path(text).absolute())
    plan = plan_chunks(files, job.settings.chunk_rows, made_by, only)
    if plan.unknown_ids:
        log.warning(
            "embed-notes: %d of the requested ids are not among the notes, for example %s",
            len(plan.unknown_ids),
            ", ".join(plan.unknown_ids[:5]),
        )
    return plan


def run_chunks(job: EmbedJob, chunks: Sequence[Chunk]) -> Generator[EmbeddedPart]:
    """Embed ``chunks`` on the cluster; yields each one's record when it is finished, in any order.

    Raises:
        NoteLLMError, OSError: the error that stopped a chunk; the finished chunks are kept.
    """
    settings = job.settings
    actors = min(settings.actors, len(chunks))
    check_resources(actors, settings)
    readers = num_readers(settings, actors, len(chunks))
    check_readers(readers, actors, settings)
    made = make_parts(
        ChunkEmbedder,
        job,
        chunks,
        actors=actors,
        cpus=settings.cpus_per_actor,
        gpus=settings.gpus_per_actor,
        reader=ChunkReader,
        readers=readers,
    )
    with closing(made):
        yield from (entry for _, entry in made)


def _check_bad_share(
    done: Sequence[EmbeddedPart], plan: ChunkPlan, store: PartStore[EmbeddedPart], settings: EmbedSettings
) -> None:
    quarantined = sum(entry.quarantined for entry in done)
    if quarantined > settings.max_bad_share * plan.notes:
        seen = sum(entry.notes for entry in done)
        reasons = "; ".join(store.first_reasons("{reason}"))
        raise errors.DataError(
            f"{quarantined} of the first {seen} notes ({plan.notes} in all) got no vector, more than "
            f"embed.max_bad_share={settings.max_bad_share:g} allows; reasons: {reasons}. "
            f"All are in {store.quarantine}. Repair the notes, or raise embed.max_bad_share"
        )


def _write_table(store: PartStore[EmbeddedPart], plan: ChunkPlan, done: Sequence[EmbeddedPart]) -> int:
    from notellm2_ray.index.table import write_table

    part_ids = [chunk.part_id for chunk in plan.chunks]
    missing = [part_id for part_id in part_ids if store.finished(part_id) is None]
    if missing:
        raise errors.OutputError(
            f"{len(missing)} part(s) were finished but are not in {store.folder} ({missing[0]}): on several machines "
            "the workspace must be on storage that all of them share"
        )
    model = require_one_model(done, store.output)
    batches = (batch for table in store.tables(part_ids) for batch in table.to_batches())
    # Not with_suffix, because a name may contain a dot.
    return write_table(store.output.with_name(store.output.name + ".lance"), batches, model_fingerprint=model)


def _counts(done: Sequence[EmbeddedPart], plan: ChunkPlan, reused: int) -> dict[str, Any]:
    return {
        "notes": plan.notes,
        "embedded": sum(entry.embedded for entry in done),
        "quarantined": sum(entry.quarantined for entry in done),
        "unknown_ids": len(plan.unknown_ids),
        "chunks": len(plan.chunks),
        "chunks_reused": reused,
        "model_fingerprint": done[0].model_fingerprint,
    }


def _model_files(model: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the model's files: enough to recognise it without reading gigabytes of weights."""
    if not model.is_dir():
        raise errors.ModelError(f"{model}: there is no model directory; train one first, or correct the path")
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return [(str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
