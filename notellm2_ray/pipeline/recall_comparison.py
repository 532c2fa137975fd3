"""Compares every embedder and every baseline on the same test pairs, and writes the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import read_manifest, write_atomically
from notellm2_ray.core.schema import Note, iter_notes
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.embedders import is_baseline, tested_inputs

if TYPE_CHECKING:
    from notellm2_ray.evaluate.recall.results import MethodRanks
    from notellm2_ray.evaluate.recall.task import RetrievalTask


def compare(
    settings: Settings, workspace: Workspace, compared: Sequence[Settings], tokenizer: str, output: Path
) -> dict[str, Any]:
    """Recall of all methods on the test pairs, written as results.json, table.txt and the report.

    Args:
        settings: of the chosen embedder, whose index the report describes.
        compared: settings of each embedder to compare; each must have embedded the test pool.
        tokenizer: directory or hub name of the LLM whose tokens decide which notes are short and long.
        output: an existing directory.

    Returns:
        The results of :func:`notellm2_ray.evaluate.recall.results.evaluate`.
    """
    from notellm2_ray.evaluate.recall.results import evaluate
    from notellm2_ray.evaluate.recall.tables import printed
    from notellm2_ray.evaluate.recall.task import RetrievalTask

    notes = read_test_notes(workspace)
    pairs = pq.read_table(workspace.test_pairs)
    rows = by_row(compared)
    lengths = token_counts(settings, tokenizer, notes)
    task = RetrievalTask.build(pairs, list(notes), lengths, settings.evaluate, _clicked_in_training(workspace))
    rankings = [*_embedder_ranks(workspace, task, rows), *_baseline_ranks(settings, workspace, task, notes)]
    results = evaluate(task, rankings, reference="basic" if "basic" in rows else None, seed=settings.seed)
    results["remarks"] = _remarks(workspace)
    write_atomically(output / "results.json", json.dumps(results, indent=1))
    write_atomically(output / "table.txt", printed(results))
    _report(settings, workspace, rows, task, results, notes, output)
    return results


def _remarks(workspace: Workspace) -> list[str]:
    """How the pairs were made, where that matters to the figures."""
    testing = json.loads(workspace.pair_statistics.read_text(encoding="utf-8")).get("testing", {})
    if not testing.get("tied_cuts"):
        return []
    return [
        f"{testing['tied_cuts']:,} of {testing['queries']:,} queries have more targets of one score than are kept; "
        "which of them are pairs was drawn at random."
    ]


def _embedder_ranks(
    workspace: Workspace, task: RetrievalTask, rows: Mapping[str, Sequence[Settings]]
) -> Iterator[MethodRanks]:
    from notellm2_ray.evaluate.recall.results import MethodRanks
    from notellm2_ray.index.table import read_vectors
    from notellm2_ray.infer.embed import inputs_by_column

    for name, seeds in rows.items():
        for column, inputs in inputs_by_column(tested_inputs(seeds[0])).items():
            ranks: dict[int | None, np.ndarray] = {
                each.train.seed: task.embedding_ranks(*read_vectors(test_table(workspace, each), column))
                for each in seeds
            }
            yield MethodRanks(name, inputs, ranks, "trained_baseline" if is_baseline(seeds[0]) else "embedder")


def _report(
    settings: Settings,
    workspace: Workspace,
    rows: Mapping[str, Sequence[Settings]],
    task: RetrievalTask,
    results: Mapping[str, Any],
    notes: Mapping[str, Note],
    output: Path,
) -> None:
    from notellm2_ray.evaluate.recall.report import write_report
    from notellm2_ray.evaluate.recall.samples import sample_neighbors
    from notellm2_ray.index.table import read_vectors

    samples: list[dict[str, Any]] = []
    for name, seeds in rows.items():
        samples += sample_neighbors(
            task,
            *read_vectors(test_table(workspace, seeds[0])),
            lambda ids: [notes[note_id] for note_id in ids],
            method=name,
            count=settings.evaluate.sample_queries,
            seed=settings.seed,
        )
    write_report(
        output,
        results=results,
        statistics=json.loads(workspace.pair_statistics.read_text(encoding="utf-8")),
        histories=_histories(workspace, rows),
        samples=samples,
        settings=to_plain(settings),
        index_info=_index_figures(workspace, settings),
    )


def _index_figures(workspace: Workspace, settings: Settings) -> dict[str, Any]:
    try:
        return {settings.embedder_name: read_manifest(workspace.index(settings.embedder_name))["counts"]}
    except OutputError:
        return {}


def by_row(compared: Sequence[Settings]) -> dict[str, list[Settings]]:
    """The embedders of each row of the table, one per seed."""
    rows: dict[str, list[Settings]] = {}
    for each in compared:
        rows.setdefault(each.embedder_row, []).append(each)
    return rows


def test_table(workspace: Workspace, each: Settings) -> Path:
    """An embedder's embedding table of the test pool."""
    return workspace.embedding_table(each.embedder_name, "test")


def read_test_notes(workspace: Workspace) -> dict[str, Note]:
    """The notes of the test pool by id, in the pool's order."""
    pool = pq.read_table(workspace.test_pool).column("note_id")
    table = ds.dataset(workspace.notes).to_table(filter=ds.field("note_id").isin(pool))
    found = {note.note_id: note for note in iter_notes(table)}
    return {note_id: found[note_id] for note_id in pool.to_pylist()}


def _clicked_in_training(workspace: Workspace) -> set[str]:
    table = pq.read_table(workspace.pair_popularity, filters=ds.field("train_clicks") > 0, columns=["note_id"])
    return set(table.column("note_id").to_pylist())


def token_counts(settings: Settings, tokenizer: str, notes: Mapping[str, Note]) -> dict[str, int]:
    """Number of text tokens of each note, before any truncation."""
    from notellm2_ray.models.embedder.preprocess import NotePreprocessor
    from notellm2_ray.models.llm import load_tokenizer

    text_only = settings.model.model_copy(update={"variant": "text_only"})
    preprocessor = NotePreprocessor(text_only, load_tokenizer(tokenizer, settings.model.revision), None)
    return {note_id: preprocessor.text_length(note) for note_id, note in notes.items()}


def _baseline_ranks(
    settings: Settings, workspace: Workspace, task: RetrievalTask, notes: Mapping[str, Note]
) -> Iterator[MethodRanks]:
    from notellm2_ray.baselines.recall.baseline import RecallData
    from notellm2_ray.baselines.recall.table import RECALL_BASELINES
    from notellm2_ray.evaluate.recall.results import MethodRanks

    data = RecallData(task, notes, workspace, settings)
    for name in settings.evaluate.baselines:
        row = RECALL_BASELINES.get(name)
        yield MethodRanks(name, row.inputs, row.ranks(data), "baseline", row.remark)


def _histories(workspace: Workspace, rows: Mapping[str, Sequence[Settings]]) -> dict[str, list[dict[str, Any]]]:
    """The logged training steps of every embedder."""
    found = {}
    for each in (one for seeds in rows.values() for one in seeds):
        lines = workspace.embedder_history(each.embedder_name).read_text(encoding="utf-8").splitlines()
        found[each.embedder_name] = [json.loads(line) for line in lines]
    return found
