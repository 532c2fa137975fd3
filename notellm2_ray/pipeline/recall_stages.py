"""The stages of recall. Each reads finished outputs and writes its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from notellm2_ray.core.cluster import connect
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.lessons.corpus import captions_for_clip, questions_for_llm
from notellm2_ray.pipeline import embedders
from notellm2_ray.pipeline import recall_outputs as outputs
from notellm2_ray.pipeline.export_model import facts_of
from notellm2_ray.pipeline.recall_comparison import compare
from notellm2_ray.pipeline.seeds import drawn_with, recall_workspace
from notellm2_ray.pipeline.stage import Planned, require, run_stage, workspace_of

log = logging.getLogger("notellm2_ray")


def prepare(settings: Settings) -> dict[str, Any]:
    """Read and check the notes and events of the source; print a summary that a person can check."""
    from notellm2_ray.data.prepare import prepare as work
    from notellm2_ray.data.sources import open_source
    from notellm2_ray.data.summary import describe, read_texts

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        counts = work(open_source(settings.source, settings.seed), settings.prepare, output)
        reading = read_texts(output / "notes", settings.model)
        summary = describe(output, counts, reading, settings.model)
        (output / "summary.txt").write_text(summary + "\n", encoding="utf-8")
        print(summary, flush=True)
        return counts | {"topics_too_long": reading.long_topics}

    return run_stage(outputs.prepared(settings), run)


def mine_pairs(settings: Settings) -> dict[str, Any]:
    """Mine related pairs from the events, and split them into training, validation and test pairs."""
    from notellm2_ray.data.pairs.mine import mine

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return mine(workspace_of(settings).prepared, output, settings.pairs, settings.split, settings.seed)

    return run_stage(outputs.pairs(settings), run)


def build_tiny(settings: Settings) -> dict[str, Any]:
    """Train the tiny models on the training notes, if the settings use any."""
    parts = embedders.tiny_parts(settings)
    if not parts:
        return {}
    from notellm2_ray.core.note_store import NoteStore
    from notellm2_ray.models.tiny.clip import train_tiny_clip
    from notellm2_ray.models.tiny.llm import train_tiny_llm

    seed = drawn_with(settings, recall_workspace(settings), "tiny")

    def run(output: Path) -> dict[str, Any]:
        # Training notes only: a model trained on the texts of test notes would have an unfair advantage.
        store = NoteStore(workspace_of(settings).train_notes)
        counts = {}
        if "llm" in parts:
            corpus = questions_for_llm(store, settings.model.prompt_language, seed)
            counts["llm"] = train_tiny_llm(corpus, settings.tiny, output / "llm", seed)
        if "clip" in parts:
            pictures = captions_for_clip(settings.model_copy(update={"seed": seed}), store)
            counts["clip"] = train_tiny_clip(pictures, settings.tiny, output / "clip", seed)
        return counts

    return run_stage(outputs.tiny(settings), run)


def planned_tiny(settings: Settings) -> list[Planned]:
    """The tiny models, if the settings use any."""
    return [outputs.tiny(settings)] if embedders.tiny_parts(settings) else []


def train_embedder(settings: Settings) -> dict[str, Any]:
    """Train the embedder that the settings name, and write its model card.

    The negatives that it is to be trained with, if any, are mined first.
    """
    from notellm2_ray.models.embedder.card import write_card
    from notellm2_ray.train.embedder import train_embedder as work

    if (source := embedders.source_of_negatives(settings)) is not None:
        _mine_for(settings.embedder_row, source)
    settings = embedders.resolved(settings)
    llm, vision = embedders.model_paths(settings)

    workspace, mined = workspace_of(settings), outputs.name_of_source(settings)

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(
            settings.model,
            settings.train,
            settings.train.seed,
            pairs=workspace.pairs,
            llm_path=llm,
            vision_path=vision,
            output=output,
            negatives=None if mined is None else workspace.negative_table(mined),
            wait_minutes=settings.ray.wait_minutes,
        )

    def save_untrained(output: Path) -> dict[str, Any]:
        from notellm2_ray.models.embedder.build import build_encoder

        encoder = build_encoder(settings.model, settings.train.seed, llm_path=llm, vision_path=vision)
        encoder.trained_dimensions = settings.train.dimensions  # what a ready model was trained for before
        encoder.save_pretrained(output / "model")
        (output / "history.jsonl").write_text("", encoding="utf-8")
        return {"steps": 0, "model_fingerprint": encoder.fingerprint}

    def run_and_describe(output: Path) -> dict[str, Any]:
        counts = run(output) if embedders.is_trained(settings) else save_untrained(output)
        write_card(output / "model", facts_of(settings, counts))
        return counts

    return run_stage(outputs.embedder(settings), run_and_describe)


def planned_embedder(settings: Settings) -> list[Planned]:
    """The embedder, after the negatives that it is trained with, if any."""
    source = embedders.source_of_negatives(settings)
    mined = [] if source is None else planned_negatives(source)
    return [*mined, outputs.embedder(embedders.resolved(settings))]


def mine_negatives(settings: Settings) -> dict[str, Any]:
    """Embed the training notes with the embedder that the settings name, and mine hard negatives of its pairs."""
    from notellm2_ray.index.mine_negatives import mine_negatives as work

    settings = embedders.resolved(settings)
    _embed(settings, "train")
    workspace = workspace_of(settings)
    table = workspace.embedding_table(settings.embedder_name, "train")

    def run(output: Path) -> dict[str, Any]:
        return work(
            workspace.pairs,
            table,
            output,
            settings.negatives,
            settings.index,
            settings.seed,
            events=workspace.events,
            click_actions=settings.pairs.click_actions,
        )

    return run_stage(outputs.negatives(settings), run)


def planned_negatives(settings: Settings) -> list[Planned]:
    """The training notes' embeddings, and the negatives."""
    settings = embedders.resolved(settings)
    return [outputs.embeddings(settings, "train"), outputs.negatives(settings)]


def _mine_for(name: str, source: Settings) -> None:
    """Mine the negatives of ``source``, unless they are there.

    Raises:
        OutputError: that embedder has not been trained.
    """
    of = source.embedder_row
    advice = f"{name} is trained with the negatives of {of}: run `notellm2 train-embedder embedder={of}` first"
    require(outputs.embedder(embedders.resolved(source)), advice)
    mine_negatives(source)


def embed_notes(settings: Settings) -> dict[str, Any]:
    """Embed every note and write the embedding table."""
    return _embed(embedders.resolved(settings), "all")


def planned_embeddings(settings: Settings) -> list[Planned]:
    return [outputs.embeddings(embedders.resolved(settings), "all")]


def _embed(settings: Settings, pool: str) -> dict[str, Any]:
    from notellm2_ray.infer.embed import embed_notes as work

    workspace = workspace_of(settings)

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        only = {"all": None, "test": workspace.test_pool, "train": output / "ids.parquet"}[pool]
        if pool == "train":
            _write_training_ids(settings, output / "ids.parquet")
        return work(
            workspace.embedder_model(settings.embedder_name),
            (settings.embed.notes if pool == "all" else None) or workspace.notes,
            output,
            settings.embed,
            inputs=embedders.shown_inputs(settings, pool),
            only_ids=only,
        )

    return run_stage(outputs.embeddings(settings, pool), run)


def _write_training_ids(settings: Settings, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from notellm2_ray.core.note_store import NoteStore

    pq.write_table(pa.table({"note_id": NoteStore(workspace_of(settings).train_notes).ids}), path)


def build_index(settings: Settings) -> dict[str, Any]:
    """Build the ANN index of the embedding table, and measure its recall against exact search."""
    from notellm2_ray.index.ann import AnnIndex
    from notellm2_ray.index.table import read_vectors

    settings = embedders.resolved(settings)

    def run(output: Path) -> dict[str, Any]:
        ids, vectors = read_vectors(workspace_of(settings).embedding_table(settings.embedder_name, "all"))
        index = AnnIndex.build(ids, vectors, settings.index, settings.seed)
        index.save(output)
        return dict(index.info)

    return run_stage(outputs.ann_index(settings), run)


def planned_index(settings: Settings) -> list[Planned]:
    return [outputs.ann_index(embedders.resolved(settings))]


def export_ids(settings: Settings) -> dict[str, Any]:
    """Write semantic ids of all embedded notes."""
    from notellm2_ray.index.id_table import write_ids

    settings = embedders.resolved(settings)
    table = workspace_of(settings).embedding_table(settings.embedder_name, "all")
    return run_stage(
        outputs.semantic_ids(settings), lambda output: write_ids(table, output, settings.ids, settings.seed)
    )


def planned_ids(settings: Settings) -> list[Planned]:
    return [outputs.semantic_ids(embedders.resolved(settings))]


def eval_retrieval(settings: Settings) -> dict[str, Any]:
    """Compare the recall of all trained embedders and baselines; print the table and write the report."""
    from notellm2_ray.evaluate.front_page import write_front_page

    compared = embedders.compared_embedders(settings)
    settings = embedders.resolved(settings)
    trained = [each for each in compared if outputs.embedder(each).complete]
    missing = [each.embedder_name for each in compared if each not in trained]
    if not trained:
        raise OutputError(
            f"no embedder of evaluate.embedders and evaluate.seeds has been trained with these settings "
            f"({', '.join(missing)}): run train-embedder, or `notellm2 run` for all of them"
        )
    if missing:
        log.warning("left out, because not trained with these settings: %s", ", ".join(missing))
    for each in trained:
        _embed(each, "test")
    workspace = workspace_of(settings)
    llm = embedders.model_paths(settings)[0]

    def run(output: Path) -> dict[str, Any]:
        results = compare(settings, workspace, trained, llm, output)
        return {"pairs": results["pairs"]["all"], "pool_notes": results["pool_notes"], "rows": len(results["rows"])}

    counts = run_stage(outputs.evaluation(settings, trained), run)
    print((workspace.recall_report / "table.txt").read_text(encoding="utf-8"))
    write_front_page(workspace.report)
    print(f"report: {workspace.report / 'index.html'}")
    return counts


def planned_evaluation(settings: Settings) -> list[Planned]:
    """The test pool's embeddings of every compared embedder, and the report."""
    compared = embedders.compared_embedders(settings)
    settings = embedders.resolved(settings)
    return [*(outputs.embeddings(each, "test") for each in compared), outputs.evaluation(settings, compared)]


def training_size(settings: Settings) -> str:
    train = settings.train
    share = train.batch_pairs // train.num_workers
    return (
        f"training: {train.num_workers} rank(s) with {train.cpus_per_worker:g} CPU(s) and {train.gpus_per_worker:g} "
        f"GPU(s) each, {share} pairs ({2 * share} notes) a rank and step, {_steps(settings)}"
    )


def training_memory(settings: Settings) -> list[str]:
    from notellm2_ray.pipeline.training_memory import embedder_memory

    return embedder_memory(settings)


def embedding_size(settings: Settings) -> str:
    embed = settings.embed
    return (
        f"embedding: {embed.actors} actor(s) with {embed.cpus_per_actor:g} CPU(s) and {embed.gpus_per_actor:g} GPU(s) "
        f"each, chunks of {embed.chunk_rows} notes, {_rows(settings)}"
    )


def _steps(settings: Settings) -> str:
    try:
        pairs = read_manifest(workspace_of(settings).pairs)["counts"]["train_pairs"]
    except OutputError:
        return "steps known once pairs are mined"
    steps = settings.train.epochs * (pairs // settings.train.batch_pairs)
    steps = min(steps, settings.train.max_steps or steps)
    return f"{pairs} pairs: {steps} steps"


def _rows(settings: Settings) -> str:
    try:
        return f"{read_manifest(workspace_of(settings).prepared)['counts']['notes']} notes"
    except OutputError:
        return "notes counted once prepared"
