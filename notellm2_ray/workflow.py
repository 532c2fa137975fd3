"""The stages in order: each reads finished directories, and writes one, complete or absent.

This is the only module that knows how the packages fit together. A stage whose output is already there, made of the
same settings and inputs, is skipped; one that was stopped goes on; one whose settings changed is made anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from notellm2_ray import outputs
from notellm2_ray.comparison import compare, embedders, for_embedder
from notellm2_ray.core.cluster import connect
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import Output, read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.model import VariantName
from notellm2_ray.corpus import captions, exercises

log = logging.getLogger("notellm2_ray")


def _run(output: Output, work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Do a stage's work unless its output is there; its manifest's counts either way."""
    name = f"{output.stage} ({output.directory.name})"
    if output.complete:
        log.info("%s: already there", name)
        return read_manifest(output.directory)["counts"]
    log.info("%s: %s", name, "continuing" if output.resumable else "starting")
    started = time.time()
    with output.write() as counts:
        counts.update(work(output.directory))
    log.info("%s: done in %.0f s: %s", name, time.time() - started, _brief(counts))
    return dict(counts)


def _brief(counts: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in counts.items() if isinstance(value, (int, float, str))}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def prepare(settings: Settings) -> dict[str, Any]:
    """Source tables to checked notes and events."""
    from notellm2_ray.data.prepare import prepare as work
    from notellm2_ray.data.sources import open_source

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(open_source(settings.source, settings.seed), settings.prepare, output)

    return _run(outputs.prepared(settings), run)


def mine_pairs(settings: Settings) -> dict[str, Any]:
    """Events to related pairs, split into training, validation and test."""
    from notellm2_ray.data.mine import mine

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return mine(outputs.workspace_of(settings) / "prepared", output, settings.pairs, settings.split, settings.seed)

    return _run(outputs.pairs(settings), run)


def build_tiny(settings: Settings) -> dict[str, Any]:
    """Train the tiny models from the training notes, if the settings name any."""
    parts = outputs.tiny_parts(settings)
    if not parts:
        return {}
    from notellm2_ray.core.note_store import NoteStore
    from notellm2_ray.models.tiny import train_tiny_clip, train_tiny_llm

    def run(output: Path) -> dict[str, Any]:
        # Training notes alone: a model that had read the test notes' texts would have an edge no checkpoint has.
        store = NoteStore(outputs.workspace_of(settings) / "pairs" / "train_notes.arrow")
        counts = {}
        if "llm" in parts:
            corpus = exercises(store, settings.model.prompt_language, settings.seed)
            counts["llm"] = train_tiny_llm(corpus, settings.tiny, output / "llm", settings.seed)
        if "clip" in parts:
            pictures = captions(settings, store)
            counts["clip"] = train_tiny_clip(pictures, settings.tiny, output / "clip", settings.seed)
        return counts

    return _run(outputs.tiny(settings), run)


def train_embedder(settings: Settings) -> dict[str, Any]:
    """Pairs to an embedder."""
    from notellm2_ray.train.launch import train_embedder as work

    llm, vision = outputs.model_paths(settings)

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(
            settings.model,
            settings.train,
            settings.train.seed,
            pairs=outputs.workspace_of(settings) / "pairs",
            llm_path=llm,
            vision_path=vision,
            output=output,
        )

    return _run(outputs.embedder(settings), run)


def embed_notes(settings: Settings) -> dict[str, Any]:
    """Every note to a vector in the embedding table."""
    return _embed(settings, "all")


def _embed(settings: Settings, pool: str) -> dict[str, Any]:
    from notellm2_ray.infer.embed import embed_notes as work

    workspace = outputs.workspace_of(settings)

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(
            workspace / "embedders" / settings.embedder_name / "model",
            (settings.embed.notes if pool == "all" else None) or workspace / "prepared" / "notes",
            output,
            settings.embed,
            inputs=outputs.inputs_of(settings, pool),
            only_ids=workspace / "pairs" / "test_pool.parquet" if pool == "test" else None,
        )

    return _run(outputs.embeddings(settings, pool), run)


def build_index(settings: Settings) -> dict[str, Any]:
    """Embedding table to ANN index, its recall against exact search measured."""
    from notellm2_ray.index.ann import AnnIndex
    from notellm2_ray.index.table import read_vectors

    def run(output: Path) -> dict[str, Any]:
        ids, vectors = read_vectors(outputs.embedding_table(settings, "all"))
        index = AnnIndex.build(ids, vectors, settings.index, settings.seed)
        index.save(output)
        return dict(index.info)

    return _run(outputs.ann_index(settings), run)


def eval_retrieval(settings: Settings) -> dict[str, Any]:
    """Recall of every embedder that is trained, beside the baselines; prints the table and writes the report."""
    trained = [each for each in embedders(settings) if outputs.embedder(each).complete]
    missing = [each.embedder_name for each in embedders(settings) if not outputs.embedder(each).complete]
    if not trained:
        raise OutputError(
            f"none of the embedders that evaluate.variants and evaluate.seeds name is trained with these settings "
            f"({', '.join(missing)}): run train-embedder, or `notellm2 run` for all of them"
        )
    if missing:
        log.warning("not trained with these settings, and left out: %s", ", ".join(missing))
    for each in trained:
        _embed(each, "test")
    counts = _run(outputs.evaluation(settings, trained), lambda output: _compare(settings, trained, output))
    report = outputs.workspace_of(settings) / "report"
    print((report / "table.txt").read_text(encoding="utf-8"))
    print(f"report: {report / 'index.html'}")
    return counts


def _compare(settings: Settings, trained: Sequence[Settings], output: Path) -> dict[str, Any]:
    tables: dict[VariantName, dict[int, Path]] = {}
    for each in trained:
        tables.setdefault(each.model.variant, {})[each.train.seed] = outputs.embedding_table(each, "test")
    results = compare(settings, outputs.workspace_of(settings), tables, outputs.model_paths(settings)[0], output)
    return {"pairs": results["pairs"]["all"], "pool_notes": results["pool_notes"], "rows": len(results["rows"])}


def run_all(settings: Settings) -> None:
    """Everything, for every variant and seed of ``evaluate``; the index is the one of ``model.variant``."""
    prepare(settings)
    mine_pairs(settings)
    build_tiny(settings)
    for each in embedders(settings):
        train_embedder(each)
    chosen = for_embedder(settings, settings.model.variant, settings.evaluate.seeds[0])
    train_embedder(chosen)
    embed_notes(chosen)
    build_index(chosen)
    eval_retrieval(chosen)


STAGES: dict[str, Callable[[Settings], Any]] = {
    "prepare": prepare,
    "mine-pairs": mine_pairs,
    "build-tiny": build_tiny,
    "train-embedder": train_embedder,
    "embed-notes": embed_notes,
    "build-index": build_index,
    "eval-retrieval": eval_retrieval,
    "run": run_all,
}
