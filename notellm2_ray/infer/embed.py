"""Bulk embedding: every note of a Parquet table to a row of the embedding table, on a pool of Ray Data actors."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from notellm2_ray.core import errors
from notellm2_ray.core.config import to_plain
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.settings import EmbedSettings
from notellm2_ray.infer.blocks import Block, Plan, list_files, plan_blocks, read_ids
from notellm2_ray.infer.part_actors import make_parts
from notellm2_ray.infer.parts import PartStore, require_one_model
from notellm2_ray.infer.resources import check_resources
from notellm2_ray.infer.worker import BlockEmbedder, EmbeddedPart, Job, part_store

log = logging.getLogger("notellm2_ray")

INPUTS = ("multimodal", "image", "text")
_SHAPING = ("batch_tokens", "max_batch_notes", "precision")  # settings that a vector's last digits depend on


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

    The notes are cut into blocks (:mod:`~notellm2_ray.infer.blocks`). Each becomes one file under ``output/blocks``,
    renamed into place when it is whole; a later run of the same job skips the blocks that are there. Thus a killed
    actor, or a killed driver, costs the blocks in hand, and the table of a run that was stopped and continued equals
    that of an undisturbed one, bit for bit. The table is written when all blocks are there, in a single commit.

    Ray Data has a checkpoint of its own (``ray.data.checkpoint``), which is not used: it commits whole output files,
    and Ray joins small rows into few of them. Measured with Ray 2.60 on 24,000 to 60,000 such rows, a job wrote a
    single file and lost all of its work at every kill.

    Ray must be connected. On several machines ``notes``, ``model`` and ``output`` lie on storage that they all share.

    Args:
        model: directory of a :class:`~notellm2_ray.models.embedder.encoder.NoteEncoder`.
        notes: Parquet file, directory, glob or object-store URI; the columns of ``NOTE_SCHEMA`` but ``created_at`` are
            read, others ignored.
        output: directory for the blocks; exists, or is made.
        inputs: what of each note is shown to the model (Table 3): ``multimodal``, ``image``, ``text``. The first, or
            multimodal if it is among them, fills the column ``embedding``, the others ``embedding_image`` and
            ``embedding_text``.
        only_ids: Parquet file with a ``note_id`` column: embed only these.

    Returns:
        Counts for the manifest: notes, embedded, quarantined, unknown_ids, blocks, blocks_reused, model_fingerprint,
        table_rows, and the seconds that went into what (``startup_seconds``: until the first block was done).

    Raises:
        ConfigError: the actors do not fit into the cluster, or ``inputs`` is not as said.
        DataError: nothing to embed, a damaged or unfit input file, a repeated id, or more notes without a usable vector
            than ``max_bad_share``.
        ModelError: the model cannot be loaded, gives nothing but NaN, or its actors keep dying.
    """
    output = Path(output).absolute()
    columns = vector_columns(inputs)
    job = Job(str(Path(model).absolute()), str(output), columns, _absolute(only_ids), settings)
    plan = plan_job(job, notes)
    store, part_ids = part_store(output), [block.part_id for block in plan.blocks]
    if removed := store.clear_leftovers(part_ids):
        log.warning("embed-notes: removed %d block(s) of another model, other settings or other notes", removed)
    finished = {part_id: store.finished(part_id) for part_id in part_ids}
    done = [entry for entry in finished.values() if entry is not None]
    todo = [block for block in plan.blocks if finished[block.part_id] is None]
    reused = len(done)
    before = sum(entry.notes for entry in done)
    with Progress("embed-notes", "notes", plan.notes, before=before, waits_for="the first block") as progress:
        if todo:
            with closing(run_blocks(job, todo)) as results:  # on an error the actors are given up at once
                for entry in results:
                    done.append(entry)
                    progress.add(entry.notes)
                    _check_bad_share(done, plan, store, settings)
    _check_bad_share(done, plan, store, settings)
    store.clear_leftovers(part_ids)  # what actors that died in this run left half-written
    started = time.monotonic()
    rows = _write_table(store, plan, done)
    return {
        **_counts(done, plan, reused),
        "startup_seconds": progress.startup_seconds,
        "embed_seconds": progress.seconds,
        "table_rows": rows,
        "table_seconds": round(time.monotonic() - started, 3),
    }


def vector_columns(inputs: Sequence[str]) -> dict[str, str]:
    """Vector column of the table to the input that fills it, ``embedding`` first.

    Raises:
        ConfigError: an unknown input, one twice, or none.
    """
    if not inputs or len(set(inputs)) != len(inputs) or not set(inputs) <= set(INPUTS):
        raise errors.ConfigError(
            f"inputs must be some of {', '.join(INPUTS)}, each once; got {', '.join(inputs) or 'none'}"
        )
    main = "multimodal" if "multimodal" in inputs else inputs[0]
    return {"embedding": main, **{f"embedding_{name}": name for name in INPUTS if name in inputs and name != main}}


def plan_job(job: Job, notes: Path | str) -> Plan:
    """The blocks of a job; their ids change with the model, the notes and whatever else shapes a vector."""
    only = None if job.only_ids is None else read_ids(job.only_ids)
    shaping = {name: value for name, value in to_plain(job.settings).items() if name in _SHAPING}
    chosen = None if only is None else fingerprint(sorted(only.to_pylist()))
    made_by = fingerprint(_model_files(Path(job.model)), dict(job.columns), shaping, chosen)
    text = str(notes)
    files = list_files(text if "://" in text else Path(text).absolute())
    plan = plan_blocks(files, job.settings.block_rows, made_by, only)
    if plan.unknown_ids:
        log.warning(
            "embed-notes: %d of the ids asked for are not among the notes, as %s",
            len(plan.unknown_ids),
            ", ".join(plan.unknown_ids[:5]),
        )
    return plan


def run_blocks(job: Job, blocks: Sequence[Block]) -> Generator[EmbeddedPart]:
    """Embed ``blocks`` on the cluster; yields each once it is done, in any order.

    Raises:
        NoteLLMError, OSError: what stopped a block; the finished blocks stay.
    """
    settings = job.settings
    actors = min(settings.actors, len(blocks))
    check_resources(actors, settings)
    made = make_parts(
        BlockEmbedder, job, blocks, actors=actors, cpus=settings.cpus_per_actor, gpus=settings.gpus_per_actor
    )
    with closing(made):
        yield from (entry for _, entry in made)


def _check_bad_share(
    done: Sequence[EmbeddedPart], plan: Plan, store: PartStore[EmbeddedPart], settings: EmbedSettings
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


def _write_table(store: PartStore[EmbeddedPart], plan: Plan, done: Sequence[EmbeddedPart]) -> int:
    from notellm2_ray.index.table import write_table

    part_ids = [block.part_id for block in plan.blocks]
    missing = [part_id for part_id in part_ids if store.finished(part_id) is None]
    if missing:
        raise errors.OutputError(
            f"{len(missing)} block(s) were embedded but are not in {store.folder} ({missing[0]}): on several "
            "machines the workspace must lie on storage that all of them share"
        )
    model = require_one_model(done, store.output)
    batches = (batch for table in store.tables(part_ids) for batch in table.to_batches())
    # Not with_suffix: a name may contain a dot.
    return write_table(store.output.with_name(store.output.name + ".lance"), batches, model_fingerprint=model)


def _counts(done: Sequence[EmbeddedPart], plan: Plan, reused: int) -> dict[str, Any]:
    return {
        "notes": plan.notes,
        "embedded": sum(entry.embedded for entry in done),
        "quarantined": sum(entry.quarantined for entry in done),
        "unknown_ids": len(plan.unknown_ids),
        "blocks": len(plan.blocks),
        "blocks_reused": reused,
        "model_fingerprint": done[0].model_fingerprint,
    }


def _model_files(model: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the model's files: enough to know it again without reading gigabytes of weights."""
    if not model.is_dir():
        raise errors.ModelError(f"{model}: there is no model directory; train one first, or correct the path")
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return [(str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
