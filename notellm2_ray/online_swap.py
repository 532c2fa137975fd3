"""`notellm2 swap-embedder`: the served notes embedded by another model, which then serves them, from one moment on."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from notellm2_ray import outputs
from notellm2_ray.core.cluster import connect
from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.run import MANIFEST, Output, files_fingerprint, read_manifest
from notellm2_ray.core.schema import NOTE_SCHEMA, Note
from notellm2_ray.core.settings import Settings
from notellm2_ray.index.table import table_info
from notellm2_ray.serve import current
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.files import WriterLock, manifests, sync_new
from notellm2_ray.serve.live_table import LiveTable
from notellm2_ray.serve.loaded_model import INPUTS, LoadedModel, Vectors, Workers
from notellm2_ray.serve.seed import seed_from_bulk
from notellm2_ray.serve.store import LiveStore
from notellm2_ray.serve.successor import Successor
from notellm2_ray.stages import run_stage

log = logging.getLogger("notellm2_ray")

_ROWS_PER_BATCH = 1024
_SECONDS_BETWEEN_LINES = 10.0


def swap_embedder(settings: Settings) -> str:
    """Make the workspace's embedder (``model``, ``seed``: as train-embedder names it) the served one.

    The notes of the live table are embedded in bulk into a new table beside it, while the service goes on. Then the
    service's writer brings that table up to date with what came meanwhile, and it is served in the old one's place,
    encoder and index together. Where no service runs this is done here. A run that was stopped is continued.

    Returns:
        What was done, for the user.

    Raises:
        OutputError: the embedder is not trained, nothing is served yet, another swap is under way, or the running
            service does not take the table over within ``serve.ready_seconds``.
        DataError, ModelError: as of bulk embedding.
    """
    directory = outputs.workspace_of(settings) / "serving"
    model = outputs.workspace_of(settings) / "embedders" / settings.embedder_name / "model"
    read_manifest(model.parent)  # finished, not half-way
    served = current.current(directory)
    if not manifests(served.table):
        raise OutputError(f"nothing is served from {directory} yet: `notellm2 serve` begins with this embedder")
    # Ray starts its processes by exec, whatever this one has imported before.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    lock = WriterLock(directory / "swap")
    try:
        return _swap(settings, directory, served, model)
    finally:
        lock.release()


def _swap(settings: Settings, directory: Path, served: current.Served, model: Path) -> str:
    already = f"{settings.embedder_name} is the model that is served already"
    if _is_served(settings, served, model):
        return already
    following = current.upcoming(directory)
    if following is None:
        work = directory / f"next-{files_fingerprint(str(model))}"
        fingerprint, held = _embed(settings, model, served, work)
        if fingerprint == LiveTable(served.table).model_fingerprint:
            shutil.rmtree(work)
            return already
        following = _fill(directory, model, work, fingerprint, held)
    elif files_fingerprint(str(following.model)) == files_fingerprint(str(model)):
        log.info("%s is filled already", following.table.name)
    else:
        raise OutputError(
            f"{following.table} is to be served next already, by {following.model}: wait until it is, or remove "
            f"{directory / current.NEXT} to give it up"
        )
    _take_over(settings, directory, following)
    _clear(directory, {served.table, following.table}, {served.model, following.model})
    return f"served from now on: {following.table}, by {following.model}"


def _is_served(settings: Settings, served: current.Served, model: Path) -> bool:
    """Whether the model is known to be the served one, without reading its weights."""
    if served.model is not None:
        return files_fingerprint(str(served.model)) == files_fingerprint(str(model))
    bulk = outputs.embedding_table(settings, "all").with_suffix("")
    if not (bulk / MANIFEST).is_file():
        return False
    manifest = read_manifest(bulk)
    same = manifest["inputs"].get("embedder") == outputs.fingerprint_of(model.parent)
    return same and manifest["counts"].get("model_fingerprint") == LiveTable(served.table).model_fingerprint


def _clear(directory: Path, tables: set[Path], models: set[Path | None]) -> None:
    """Remove what swaps before left. The table before this one stays: replicas read it until they have loaded."""
    old = [one for one in directory.glob("live*.lance") if one not in tables]
    old += [one for one in (directory / current.MODELS).iterdir() if one not in models]
    for one in [*directory.glob("next-*"), *old]:
        log.info("swap-embedder: removing %s", one)
        shutil.rmtree(one)


def _embed(settings: Settings, model: Path, served: current.Served, work: Path) -> tuple[str, int]:
    """Embed the served notes as they are now; the model's fingerprint, and the last commit group among the notes."""
    from notellm2_ray.infer.embed import embed_notes

    shaped = {"table": served.table.name, "model": LiveTable(served.table).model_fingerprint}
    exported = run_stage(
        Output(work / "notes", "export-served-notes", shaped), lambda output: _export(served.table, output)
    )
    inputs = [INPUTS[column] for column in LiveTable(served.table).columns]

    def embed(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return embed_notes(model, work / "notes" / "notes.parquet", output, settings.embed, inputs=inputs)

    how = {"embed": outputs.shaping(settings.embed), "inputs": inputs}
    sources = {"notes": str(exported["version"]), "model": files_fingerprint(str(model))}
    run_stage(Output(work / "embeddings", "embed-served-notes", how, sources), embed)
    return table_info(work / "embeddings.lance").model_fingerprint, exported["seq"]


def _export(path: Path, output: Path) -> dict[str, Any]:
    """The notes of one version of a live table, as bulk embedding reads them."""
    import pyarrow.parquet as pq

    table = LiveTable(path)
    scanner = table.dataset.scanner(columns=NOTE_SCHEMA.names, filter="NOT deleted", batch_size=_ROWS_PER_BATCH)
    notes = 0
    with pq.ParquetWriter(output / "notes.parquet", NOTE_SCHEMA) as writer:
        for batch in scanner.to_batches():
            writer.write_batch(batch.cast(NOTE_SCHEMA), row_group_size=_ROWS_PER_BATCH)
            notes += batch.num_rows
    if not notes:
        raise DataError(f"{path} holds no notes: there is nothing to embed")
    return {"notes": notes, "seq": table.last_seq(), "version": table.version}


def _fill(directory: Path, model: Path, work: Path, fingerprint: str, seq: int) -> current.Served:
    """The new table and a copy of its model beside it, named in NEXT."""
    kept = directory / current.MODELS / fingerprint
    if not kept.is_dir():
        # The service keeps its model: training anew in this workspace replaces the embedder's directory.
        unfinished = kept.with_name(f".{fingerprint}")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(model, unfinished)
        sync_new(unfinished, set())
        unfinished.rename(kept)
    table = directory / f"live-{fingerprint}.lance"
    if manifests(table):  # of a swap that was stopped, or of one to another model and now back
        shutil.rmtree(table)
    seeded = seed_from_bulk(work / "notes" / "notes.parquet", work / "embeddings.lance", table, seq=seq)
    if seeded.without_vector:
        log.warning("%d note(s) have no vector of the new model and are left out", seeded.without_vector)
    current.set_upcoming(directory, table, kept, seq)
    following = current.upcoming(directory)
    assert following is not None
    return following


def _take_over(settings: Settings, directory: Path, following: current.Served) -> None:
    """Wait until the service's writer has done it, or do it, where nobody writes.

    Raises:
        OutputError: the service does not.
    """
    until, told = time.monotonic() + settings.serve.ready_seconds, 0.0
    while current.current(directory).table != following.table:
        store = _if_free(current.current_table(directory))
        if store is not None:
            with store:
                asyncio.run(_serve_next(directory, following, store, settings))
            return
        if time.monotonic() > until:
            raise OutputError(
                f"the service has not taken {following.table} over within serve.ready_seconds="
                f"{settings.serve.ready_seconds:g}: its log says why, and it goes on trying. Run this again to wait "
                f"on, or remove {directory / current.NEXT} to give it up"
            )
        if time.monotonic() > told + _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            log.info("swap-embedder: waiting for the running service to take %s over", following.table.name)
        time.sleep(0.5)


def _if_free(table: Path) -> LiveStore | None:
    """The table's writer, unless a service is."""
    try:
        return LiveStore.open(table)
    except OutputError:
        return None


async def _serve_next(directory: Path, following: current.Served, store: LiveStore, settings: Settings) -> None:
    assert following.model is not None
    loaded = LoadedModel(following.model, "cpu", Workers(settings.serve.encode, Figures("swap-embedder")))

    async def encode(notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        return await loaded.encode(notes, columns)

    successor = Successor(following, encode)
    with successor.store:
        await successor.catch_up(store.table)
        successor.store.skip_to(store.seq)
        current.set_current(directory, following.table, following.model)
        current.forget_upcoming(directory)
