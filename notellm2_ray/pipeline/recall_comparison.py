"""Every trained embedder and every baseline on the same test pairs, and the report of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
from notellm2_ray.core.settings.model import VariantName

if TYPE_CHECKING:
    from notellm2_ray.evaluate.recall.results import MethodRanks
    from notellm2_ray.evaluate.recall.task import RetrievalTask


def for_embedder(settings: Settings, variant: VariantName, seed: int) -> Settings:
    """The settings that train one of the compared embedders."""
    model = settings.model.model_copy(update={"variant": variant})
    return settings.model_copy(update={"model": model, "train": settings.train.model_copy(update={"seed": seed})})


def embedders(settings: Settings) -> Iterator[Settings]:
    """Settings of every embedder that ``evaluate`` names: each variant with each seed."""
    for variant in settings.evaluate.variants:
        for seed in settings.evaluate.seeds:
            yield for_embedder(settings, variant, seed)


def natural_inputs(variant: VariantName) -> str:
    """What a variant is meant to be given."""
    from notellm2_ray.models.embedder.variants import VARIANTS

    kind = VARIANTS[variant]
    return "image" if kind.prompt is None else "multimodal" if kind.sees_images else "text"


def tested_inputs(settings: Settings, variant: VariantName) -> tuple[str, ...]:
    """What a variant is tested with, its natural input first (Table 3 for those that take both)."""
    natural = natural_inputs(variant)
    if natural != "multimodal":
        return (natural,)
    return (natural, *(name for name in settings.evaluate.inputs if name != natural))


def compare(
    settings: Settings, workspace: Path, tables: Mapping[VariantName, Mapping[int, Path]], tokenizer: str, output: Path
) -> dict[str, Any]:
    """Recall of all methods on the test pairs, written as results.json, table.txt and the report.

    Args:
        settings: those of the chosen embedder, whose index figures and sample neighbours the report shows.
        tables: variant to training seed to its embedding table of the test pool.
        tokenizer: directory or name of the LLM whose tokens make a note short or long.
        output: directory to write into.

    Returns:
        what :func:`notellm2_ray.evaluate.recall.results.evaluate` does.
    """
    from notellm2_ray.evaluate.recall.results import evaluate
    from notellm2_ray.evaluate.recall.task import RetrievalTask

    notes = read_test_notes(workspace)
    pairs = pq.read_table(workspace / "pairs" / "test.parquet")
    lengths = token_counts(settings, tokenizer, notes)
    task = RetrievalTask.build(pairs, list(notes), lengths, settings.evaluate)
    rankings = [*_embedder_ranks(settings, task, tables), *_baseline_ranks(settings, workspace, task, notes)]
    results = evaluate(task, rankings, reference="basic" if "basic" in tables else None)
    write_atomically(output / "results.json", json.dumps(results, indent=1))
    write_atomically(output / "table.txt", _printed(results))
    _report(settings, workspace, tables, task, results, notes, output)
    return results


def _embedder_ranks(
    settings: Settings, task: RetrievalTask, tables: Mapping[VariantName, Mapping[int, Path]]
) -> Iterator[MethodRanks]:
    from notellm2_ray.evaluate.recall.results import MethodRanks
    from notellm2_ray.index.table import read_vectors
    from notellm2_ray.infer.embed import vector_columns

    for variant, seeds in tables.items():
        for column, inputs in vector_columns(tested_inputs(settings, variant)).items():
            ranks: dict[int | None, np.ndarray] = {
                seed: task.embedding_ranks(*read_vectors(path, column)) for seed, path in seeds.items()
            }
            yield MethodRanks(variant, inputs, ranks)


def _printed(results: Mapping[str, Any]) -> str:
    from notellm2_ray.evaluate.recall.tables import recall_table

    return f"{recall_table(results)}\n\n{recall_table(results, inputs=True)}\n"


def _report(
    settings: Settings,
    workspace: Path,
    tables: Mapping[VariantName, Mapping[int, Path]],
    task: RetrievalTask,
    results: Mapping[str, Any],
    notes: Mapping[str, Note],
    output: Path,
) -> None:
    from notellm2_ray.evaluate.recall.report import write_report
    from notellm2_ray.evaluate.recall.samples import sample_neighbors
    from notellm2_ray.index.table import read_vectors

    samples: list[dict[str, Any]] = []
    for variant, seeds in tables.items():
        samples += sample_neighbors(
            task,
            *read_vectors(next(iter(seeds.values()))),
            lambda ids: [notes[note_id] for note_id in ids],
            method=variant,
            count=settings.evaluate.sample_queries,
            seed=settings.seed,
        )
    write_report(
        output,
        results=results,
        statistics=json.loads((workspace / "pairs" / "statistics.json").read_text(encoding="utf-8")),
        histories=_histories(workspace, tables),
        samples=samples,
        settings=to_plain(settings),
        index_info=_index_figures(workspace, settings),
    )


def _index_figures(workspace: Path, settings: Settings) -> dict[str, Any]:
    try:
        return {settings.embedder_name: read_manifest(workspace / "index" / settings.embedder_name)["counts"]}
    except OutputError:
        return {}


def read_test_notes(workspace: Path) -> dict[str, Note]:
    """The notes of the test pool, by id, in the pool's order."""
    pool = pq.read_table(workspace / "pairs" / "test_pool.parquet").column("note_id")
    table = ds.dataset(workspace / "prepared" / "notes").to_table(filter=ds.field("note_id").isin(pool))
    found = {note.note_id: note for note in iter_notes(table)}
    return {note_id: found[note_id] for note_id in pool.to_pylist()}


def token_counts(settings: Settings, tokenizer: str, notes: Mapping[str, Note]) -> dict[str, int]:
    """Tokens of text of each note, nothing cut."""
    from notellm2_ray.models.embedder.preprocess import NotePreprocessor
    from notellm2_ray.models.llm import load_tokenizer

    text_only = settings.model.model_copy(update={"variant": "text_only"})
    preprocessor = NotePreprocessor(text_only, load_tokenizer(tokenizer, settings.model.revision), None)
    return {note_id: preprocessor.text_length(note) for note_id, note in notes.items()}


def _baseline_ranks(
    settings: Settings, workspace: Path, task: RetrievalTask, notes: Mapping[str, Note]
) -> Iterator[MethodRanks]:
    from notellm2_ray.evaluate.recall.results import MethodRanks

    for name in settings.evaluate.baselines:
        if name == "bm25":
            from notellm2_ray.baselines.recall.bm25 import Bm25
            from notellm2_ray.core.words import note_text

            index = Bm25(note_text(notes[note_id]) for note_id in task.pool_ids)
            queries = [note_text(notes[note_id]) for note_id in task.query_ids]
            ranks = index.ranks(queries, task.query_rows, task.target_rows)
            yield MethodRanks(name, "text", {None: ranks}, baseline=True)
        elif name == "popularity":
            table = pq.read_table(workspace / "pairs" / "popularity.parquet")
            clicks = dict(zip(table.column("note_id").to_pylist(), table.column("clicks").to_pylist(), strict=True))
            yield MethodRanks(name, "-", {None: task.popularity_ranks(clicks)}, baseline=True)
        else:
            seeds: dict[int | None, np.ndarray] = {seed: task.random_ranks(seed) for seed in settings.evaluate.seeds}
            yield MethodRanks(name, "-", seeds, baseline=True)


def _histories(workspace: Path, tables: Mapping[VariantName, Mapping[int, Path]]) -> dict[str, list[dict[str, Any]]]:
    """The logged steps of every embedder."""
    found = {}
    for variant, seeds in tables.items():
        for seed in seeds:
            name = f"{variant}-seed{seed}"
            path = workspace / "embedders" / name / "history.jsonl"
            found[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found
