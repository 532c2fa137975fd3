"""`notellm2 swap-embedder`: embed the served notes with another model, then serve that model and its table."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from notellm2_ray.core.cluster import connect
from notellm2_ray.core.config import shaping
from notellm2_ray.core.errors import DataError, ModelError, OutputError
from notellm2_ray.core.run import MANIFEST, Output, files_fingerprint, read_manifest
from notellm2_ray.core.schema import NOTE_SCHEMA, Note
from notellm2_ray.core.settings import Settings
from notellm2_ray.index.table import table_info
from notellm2_ray.infer.embed_worker import embedded_parts
from notellm2_ray.live import current
from notellm2_ray.live.durability import VERSIONS, WriterLock, manifests
from notellm2_ray.live.seed import seed_from_bulk
from notellm2_ray.live.store import LiveStore
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.pipeline.embedders import resolved
from notellm2_ray.pipeline.stage import fingerprint_of, run_stage, workspace_of
from notellm2_ray.serve.deployments.loaded_model import INPUTS, LoadedModel, Vectors, Workers
from notellm2_ray.serve.deployments.successor import Successor
from notellm2_ray.serve.figures import Figures

log = logging.getLogger("notellm2_ray")

_ROWS_AT_ONCE = 512
_RESTART_SECONDS = 15.0  # twice the time that a writer's replica takes to restart
_TABLE_NAME = re.compile(r"live(-[0-9a-f]{16})?\.lance")
_SECONDS_BETWEEN_LINES = 10.0


def swap_embedder(settings: Settings) -> str:
    """Serve with the workspace's embedder that the settings name (``model``, ``seed``).

    While the service goes on, the notes of the live table are embedded in bulk into a new table. Then the service's
    writer adds the notes that were written meanwhile, and the service switches to the new table and model, encoder and
    index together. If no service runs, this process does the writer's part. A swap that was stopped is continued.

    Returns:
        A sentence for the user that says what was done.

    Raises:
        OutputError: the embedder is not trained, nothing is served yet, another swap is running, or the running service
            does not take the table over within ``serve.ready_seconds``.
        DataError, ModelError: as of bulk embedding.
    """
    settings = resolved(settings)
    directory = workspace_of(settings).serving
    model = workspace_of(settings).embedder_model(settings.embedder_name)
    read_manifest(model.parent)  # raises if its training is not finished
    served = current.current(directory)
    if not manifests(served.table):
        raise OutputError(f"nothing is served from {directory} yet: `notellm2 serve` starts with this embedder")
    # Lance warns about forks, but Ray starts its processes by exec.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    lock = WriterLock(directory / "swap")
    try:
        done = _swap(settings, directory, served, model)
        _remove_old(directory)
        return done
    finally:
        lock.release()


def _swap(settings: Settings, directory: Path, served: current.Served, model: Path) -> str:
    next_served = current.upcoming(directory)
    if next_served is not None and next_served.source != served.table.name:
        current.forget_upcoming(directory)  # it was filled from a table that is no longer served
        next_served = None
    if _is_served(settings, served, model):
        return f"{settings.embedder_name} is served already"
    left_out = 0
    if next_served is None:
        work = directory / f"next-{files_fingerprint(str(model))}"
        fingerprint, held = _embed(settings, model, served, work)
        if fingerprint == LiveTable(served.table).model_fingerprint:
            return f"{settings.embedder_name} is served already"
        next_served, left_out = _fill(directory, served, model, work, fingerprint, held)
    elif files_fingerprint(str(next_served.model)) == files_fingerprint(str(model)):
        log.info("%s is filled already", next_served.table.name)
    else:
        raise OutputError(
            f"another swap is running, to {next_served.table} with {next_served.model}: wait until it is done, or "
            f"remove {directory / current.NEXT} to give it up"
        )
    _take_over(settings, directory, next_served)
    without = f"; {left_out} note(s) without a vector are left out, see the log" if left_out else ""
    return f"served from now on: {next_served.table} with {next_served.model}{without}"


def _is_served(settings: Settings, served: current.Served, model: Path) -> bool:
    """Whether the model is certainly the served one; its weights are not read."""
    if served.model is not None:
        return files_fingerprint(str(served.model)) == files_fingerprint(str(model))
    bulk = workspace_of(settings).embeddings(settings.embedder_name, "all")
    if not (bulk / MANIFEST).is_file():
        return False
    manifest = read_manifest(bulk)
    same = manifest["inputs"].get("embedder") == fingerprint_of(model.parent)
    return same and manifest["counts"].get("model_fingerprint") == LiveTable(served.table).model_fingerprint


def _remove_old(directory: Path) -> None:
    """Remove the swap's temporary files, and all tables and models but the served ones and those served before."""
    served = current.current(directory)
    next_served = current.upcoming(directory)
    used = [one.table for one in (served, next_served) if one is not None]
    tables = [one for one in directory.glob("live*.lance") if _TABLE_NAME.fullmatch(one.name) and one not in used]
    tables.sort(key=lambda one: (one / VERSIONS).stat().st_mtime)
    kept = {served.model, next_served and next_served.model} | {
        directory / current.MODELS / LiveTable(one).model_fingerprint for one in tables[-1:]
    }
    models = [one for one in (directory / current.MODELS).glob("*") if one not in kept]
    for one in [*directory.glob("next-*"), *tables[:-1], *models]:
        log.info("swap-embedder: removing %s", one)
        shutil.rmtree(one)


def _embed(settings: Settings, model: Path, served: current.Served, work: Path) -> tuple[str, int]:
    """Embed the served notes as they are now; the model's fingerprint, and the last commit group of the notes."""
    from notellm2_ray.infer.embed import embed_notes

    shaped = {"table": served.table.name, "model": LiveTable(served.table).model_fingerprint}
    exported = run_stage(
        Output(work / "notes", "export-served-notes", shaped), lambda output: _export(served.table, output)
    )
    inputs = [INPUTS[column] for column in LiveTable(served.table).columns]

    def embed(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return embed_notes(model, work / "notes" / "notes.parquet", output, settings.embed, inputs=inputs)

    how = {"embed": shaping(settings.embed), "inputs": inputs}
    sources = {"notes": str(exported["version"]), "model": files_fingerprint(str(model))}
    run_stage(Output(work / "embeddings", "embed-served-notes", how, sources), embed)
    return table_info(work / "embeddings.lance").model_fingerprint, exported["seq"]


def _export(path: Path, output: Path) -> dict[str, Any]:
    """The notes of a live table, as bulk embedding reads them.

    Those of one version, each as it is when it is read, for a version does not outlive a clean-up. What has changed
    since is carried over later.
    """
    import pyarrow.parquet as pq

    table = LiveTable(path)
    seq, version = table.last_seq(), table.version
    ids = table.dataset.to_table(columns=["note_id"], filter="NOT deleted")["note_id"].to_pylist()
    notes = 0
    with pq.ParquetWriter(output / "notes.parquet", NOTE_SCHEMA) as writer:
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            part = ids[start : start + _ROWS_AT_ONCE]
            stored = newest_if_gone(table, partial(LiveTable.notes, note_ids=part))
            found = [one for one in stored if one is not None]
            rows = pa.Table.from_pylist([one._asdict() for one in found], schema=NOTE_SCHEMA)
            writer.write_table(rows, row_group_size=_ROWS_AT_ONCE)
            notes += len(found)
    if not notes:
        raise DataError(f"{path} holds no notes: there is nothing to embed")
    return {"notes": notes, "seq": seq, "version": version}


def _fill(
    directory: Path, served: current.Served, model: Path, work: Path, fingerprint: str, seq: int
) -> tuple[current.Served, int]:
    """Make the new table, copy its model and name both in NEXT; also the number of notes without a vector."""
    kept = current.keep_model(directory, model, fingerprint)
    table = directory / f"live-{fingerprint}.lance"
    if manifests(table):  # left by a swap that was stopped, or by an earlier swap to this model
        LiveStore.open(table).close()  # raises if another process writes it
        shutil.rmtree(table)
    seeded = seed_from_bulk(work / "notes" / "notes.parquet", work / "embeddings.lance", table, seq=seq)
    if seeded.without_vector:
        reasons = "; ".join(embedded_parts(work / "embeddings").first_reasons("{reason}"))
        log.warning("%d note(s) have no vector by the new model and are left out: %s", seeded.without_vector, reasons)
    if current.current(directory).table != served.table:
        raise OutputError(f"{served.table} is no longer served: run this again")
    current.set_upcoming(directory, table, kept, served.table.name, seq)
    next_served = current.upcoming(directory)
    assert next_served is not None
    return next_served, seeded.without_vector


def _take_over(settings: Settings, directory: Path, next_served: current.Served) -> None:
    """Wait until the service has switched to the table; if no service runs, do it here.

    Raises:
        OutputError: the service does not do it in time.
    """
    if _nobody_writes(directory / next_served.source):
        asyncio.run(_serve_next(directory, next_served, settings))
        return
    until, logged = time.monotonic() + settings.serve.ready_seconds, 0.0
    while current.current(directory).table != next_served.table:
        if time.monotonic() > until:
            raise OutputError(
                f"the service has not taken {next_served.table.name} over within serve.ready_seconds="
                f"{settings.serve.ready_seconds:g} ({current.waiting_reason(directory) or 'no reason given'}). It "
                f"keeps trying: run this again to wait longer, or remove {directory / current.NEXT} to give up"
            )
        if time.monotonic() > logged + _SECONDS_BETWEEN_LINES:
            logged = time.monotonic()
            reason = current.waiting_reason(directory)
            log.info(
                "swap-embedder: waiting until the running service has taken over %s%s",
                next_served.table.name,
                reason and f": {reason}",
            )
        time.sleep(0.5)


def _nobody_writes(table: Path) -> bool:
    """Whether no service writes the table; waits long enough for a service to restart its writer."""
    until = time.monotonic() + _RESTART_SECONDS
    while time.monotonic() < until:
        try:
            WriterLock(table).release()
        except OutputError:
            return False
        time.sleep(0.5)
    return True


async def _serve_next(directory: Path, next_served: current.Served, settings: Settings) -> None:
    """Do what the service's writer does, if no service runs."""
    model: list[LoadedModel] = []

    async def encode(notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        return await model[0].encode(notes, columns)

    successor = Successor(next_served, encode)
    with successor.store:
        source = directory / next_served.source
        if (await successor.missed(LiveTable(source))).notes:  # load the model before locking the source
            assert next_served.model is not None
            workers = Workers(
                settings.serve.encode, settings.embed.precision, Figures("swap-embedder"), settings.embed.dimensions
            )
            model.append(LoadedModel(next_served.model, "cpu", workers, successor.store.model_fingerprint))
            if model[0].fingerprint != successor.store.model_fingerprint:
                raise ModelError(
                    f"{next_served.model} has the fingerprint {model[0].fingerprint} on this machine, and "
                    f"{next_served.table.name} holds vectors of {successor.store.model_fingerprint}: start the "
                    "service, which will take the table over"
                )
            await successor.catch_up(LiveTable(source))
        with LiveStore.open(source) as store:
            if current.current(directory).table != source or (await successor.missed(store.table)).notes:
                raise OutputError(f"{source} was written to meanwhile: run this again")
            successor.store.skip_to(store.seq)
            current.set_current(directory, next_served.table, next_served.model)
            current.forget_upcoming(directory)
