"""The stages in order: each reads finished directories, and writes one, complete or absent.

This is the only module that knows how the packages fit together. A stage whose output is already there, made of the
same settings and inputs, is skipped; one that was stopped goes on; one whose settings changed is made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from notellm2_ray.core.cluster import connect
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.model import VariantName
from notellm2_ray.lessons.corpus import captions, exercises
from notellm2_ray.pipeline import ranking_stages as ranking
from notellm2_ray.pipeline import recall_outputs as outputs
from notellm2_ray.pipeline.ranking_outputs import needs_tiny_embedder_parts
from notellm2_ray.pipeline.recall_comparison import compare, embedders, for_embedder
from notellm2_ray.pipeline.stage import run_stage

log = logging.getLogger("notellm2_ray")


def prepare(settings: Settings) -> dict[str, Any]:
    """Source tables to checked notes and events."""
    from notellm2_ray.data.prepare import prepare as work
    from notellm2_ray.data.sources import open_source

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(open_source(settings.source, settings.seed), settings.prepare, output)

    return run_stage(outputs.prepared(settings), run)


def mine_pairs(settings: Settings) -> dict[str, Any]:
    """Events to related pairs, split into training, validation and test."""
    from notellm2_ray.data.pairs.mine import mine

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return mine(outputs.workspace_of(settings) / "prepared", output, settings.pairs, settings.split, settings.seed)

    return run_stage(outputs.pairs(settings), run)


def build_tiny(settings: Settings) -> dict[str, Any]:
    """Train the tiny models from the training notes, if the settings name any."""
    parts = outputs.tiny_parts(settings)
    if not parts:
        return {}
    from notellm2_ray.core.note_store import NoteStore
    from notellm2_ray.models.tiny.clip import train_tiny_clip
    from notellm2_ray.models.tiny.llm import train_tiny_llm

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

    return run_stage(outputs.tiny(settings), run)


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

    return run_stage(outputs.embedder(settings), run)


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

    return run_stage(outputs.embeddings(settings, pool), run)


def build_index(settings: Settings) -> dict[str, Any]:
    """Embedding table to ANN index, its recall against exact search measured."""
    from notellm2_ray.index.ann import AnnIndex
    from notellm2_ray.index.table import read_vectors

    def run(output: Path) -> dict[str, Any]:
        ids, vectors = read_vectors(outputs.embedding_table(settings, "all"))
        index = AnnIndex.build(ids, vectors, settings.index, settings.seed)
        index.save(output)
        return dict(index.info)

    return run_stage(outputs.ann_index(settings), run)


def eval_retrieval(settings: Settings) -> dict[str, Any]:
    """Recall of every embedder that is trained, beside the baselines; prints the table and writes the report."""
    from notellm2_ray.evaluate.front_page import write_front_page

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
    counts = run_stage(outputs.evaluation(settings, trained), lambda output: _compare(settings, trained, output))
    report = outputs.workspace_of(settings) / "report" / "retrieval"
    print((report / "table.txt").read_text(encoding="utf-8"))
    write_front_page(report.parent)
    print(f"report: {report.parent / 'index.html'}")
    return counts


def _compare(settings: Settings, trained: Sequence[Settings], output: Path) -> dict[str, Any]:
    tables: dict[VariantName, dict[int, Path]] = {}
    for each in trained:
        tables.setdefault(each.model.variant, {})[each.train.seed] = outputs.embedding_table(each, "test")
    results = compare(settings, outputs.workspace_of(settings), tables, outputs.model_paths(settings)[0], output)
    return {"pairs": results["pairs"]["all"], "pool_notes": results["pool_notes"], "rows": len(results["rows"])}


def run_retrieval(settings: Settings) -> None:
    """From raw notes to recall, for every variant and seed of ``evaluate``; the index is that of ``model.variant``."""
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


def run_ranking(settings: Settings) -> None:
    """From raw notes to ranking, for every variant and seed of ``ranking``."""
    prepare(settings)
    if needs_tiny_embedder_parts(settings):
        mine_pairs(settings)
        build_tiny(settings)
    ranking.run_ranking(settings)


def run_all(settings: Settings) -> None:
    """Both halves, at the same time."""
    from notellm2_ray.evaluate.front_page import write_front_page
    from notellm2_ray.pipeline.halves import run_halves

    prepare(settings)
    run_halves(settings, outputs.workspace_of(settings))
    write_front_page(outputs.workspace_of(settings) / "report")  # two that end at once may each miss the other


STAGES: dict[str, Callable[[Settings], Any]] = {
    "prepare": prepare,
    "mine-pairs": mine_pairs,
    "build-tiny": build_tiny,
    "train-embedder": train_embedder,
    "embed-notes": embed_notes,
    "build-index": build_index,
    "eval-retrieval": eval_retrieval,
    "make-sequences": ranking.make_sequences,
    "build-tiny-mllm": ranking.build_tiny_mllm,
    "summarize-images": ranking.summarize_images,
    "summarize-preferences": ranking.summarize_preferences,
    "train-ranker": ranking.train_ranker,
    "score-candidates": ranking.score_candidates,
    "eval-ranking": ranking.eval_ranking,
    "sweep": ranking.sweep,
    "run-retrieval": run_retrieval,
    "run-ranking": run_ranking,
    "run": run_all,
}
