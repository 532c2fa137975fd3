"""The stages of ranking; those of recall are in :mod:`notellm2_ray.pipeline.recall_stages`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from notellm2_ray.core.cluster import connect
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import RankerVariant
from notellm2_ray.pipeline import ranking_outputs as outputs
from notellm2_ray.pipeline.seeds import drawn_with, each_with_own, ranking_workspace
from notellm2_ray.pipeline.stage import Planned, require, run_stage, run_together, workspace_of

SPLITS = ("train", "valid", "test")


def make_sequences(settings: Settings) -> dict[str, Any]:
    """Make histories, blocks, targets and candidates from the events."""
    from notellm2_ray.data.sequences.make import make_sequences as work

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        workspace = ranking_workspace(settings)
        draws = drawn_with(settings, workspace, "sequences")
        knobs = settings.sequences, settings.candidates
        return work(workspace.prepared, output, *knobs, settings.seed, draws=draws)

    return run_stage(outputs.sequences(settings), run)


def build_tiny_mllm(settings: Settings) -> dict[str, Any]:
    """Train the tiny multimodal LLM on drawings and texts, if the settings use it."""
    if not outputs.uses_tiny_mllm(settings):
        return {}
    from notellm2_ray.lessons.tastes import lessons
    from notellm2_ray.models.tiny.mllm import train_tiny_mllm

    seed = drawn_with(settings, ranking_workspace(settings), "tiny_mllm")

    def run(output: Path) -> dict[str, Any]:
        texts = _texts(workspace_of(settings).notes)
        lesson = lessons(settings.model_copy(update={"seed": seed}))
        return train_tiny_mllm(lesson, texts, settings.tiny, output, seed)

    return run_stage(outputs.tiny_mllm(settings), run)


def _texts(notes: Path) -> Iterator[str]:
    """The texts of all notes, without any events."""
    import pyarrow.dataset as ds

    from notellm2_ray.core.schema import Note, iter_notes
    from notellm2_ray.core.words import note_text

    columns = {name: ds.field(name) for name in Note._fields if name != "image"}
    for batch in ds.dataset(notes).to_batches(columns={**columns, "image": ds.scalar(None)}):
        yield from map(note_text, iter_notes(batch))


def summarize_images(settings: Settings) -> dict[str, Any]:
    """Summarise every note's image in words."""
    from notellm2_ray.infer.summaries import summarize_images as work

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(
            outputs.ranking_model(settings, settings.summaries.model),
            workspace_of(settings).notes,
            output,
            settings.summaries,
            settings.generation,
            settings.prompts.language,
        )

    return run_stage(outputs.image_summaries(settings), run)


def summarize_preferences(settings: Settings) -> dict[str, Any]:
    """Summarise users' blocks of history as preferences of ``preferences.variant``."""
    return {history or "own": _summarize(settings, history) for history in outputs.preference_histories(settings)}


def _summarize(settings: Settings, history: str) -> dict[str, Any]:
    from notellm2_ray.infer.preferences import summarize_preferences as work

    workspace, histories = ranking_workspace(settings), outputs.histories_of(settings)
    with_images = settings.preferences.variant != "no_image_summary"

    def run(output: Path) -> dict[str, Any]:
        connect(settings.ray)
        return work(
            outputs.ranking_model(settings, settings.preferences.model),
            histories.blocks(history),
            workspace.notes,
            workspace.summary_table if with_images else None,
            output,
            settings.preferences,
            settings.generation,
            settings.prompts.language,
            seed=drawn_with(settings, workspace, "preferences"),
            needed=_needed(settings, history, output) if settings.preferences.variant == "direct" else None,
            logs=workspace.preference_logs(settings.preferences.variant, history),
        )

    return run_stage(outputs.preferences(settings, history), run)


def _needed(settings: Settings, history: str, output: Path) -> Path:
    """A Parquet file of every (user_id, block) whose preference an example needs."""
    import pyarrow.parquet as pq

    parts = (history,) if history else SPLITS
    workspace = outputs.histories_of(settings)
    tables = [pq.read_table(workspace.examples(part), columns=["user_id", "block"]) for part in parts]
    path = output / "needed.parquet"
    pq.write_table(pa.concat_tables(tables).group_by(["user_id", "block"]).aggregate([]), path)
    return path


def train_ranker(settings: Settings) -> dict[str, Any]:
    """Fine-tune the ranker that the settings name."""
    from notellm2_ray.infer.engine import engine_arguments
    from notellm2_ray.infer.model_facts import check_model
    from notellm2_ray.train.ranker import train_ranker as work

    kind = outputs.PREFERENCES[settings.ranker.variant]
    if kind is not None:
        written = outputs.preferences(outputs.for_preferences(settings, kind))
        require(written, "run summarize-preferences, or `notellm2 run-ranking` for everything")

    def run(output: Path) -> dict[str, Any]:
        model, images = outputs.ranking_model(settings, settings.ranker.model), settings.ranker.variant != "tallrec"
        # Raises now, not after the tuning, if no engine could score with the model.
        engine_arguments(check_model(model, images=images), settings.generation, images=int(images))
        connect(settings.ray)
        return work(
            settings.ranker,
            settings.tune,
            model_path=model,
            sequences=ranking_workspace(settings).sequences,
            notes=workspace_of(settings).notes,
            preferences=_preferences(settings, settings.ranker.variant),
            output=output,
            language=settings.prompts.language,
            max_model_len=settings.generation.max_model_len,
            wait_minutes=settings.ray.wait_minutes,
        )

    return run_stage(outputs.ranker(settings), run)


def _preferences(settings: Settings, variant: RankerVariant, history: str = "") -> Path | None:
    kind = outputs.PREFERENCES[variant]
    return None if kind is None else ranking_workspace(settings).preference_table(kind, history)


def score_candidates(settings: Settings) -> dict[str, Any]:
    """Compute P(yes) of every compared model for every candidate. Each model's engine is started once."""
    by_model: dict[str, list[outputs.Scored]] = defaultdict(list)
    for table in outputs.scored(settings):
        if table.tuned and table.seed is not None:
            tuned = outputs.ranker(outputs.for_ranker(settings, table.ranker, table.seed))
            require(tuned, "run train-ranker, or `notellm2 run-ranking` for all of them")
        by_model[_scoring_model(settings, table)].append(table)
    counts: dict[str, Any] = {}
    for model, tables in by_model.items():
        found = run_together(
            [outputs.scores(settings, table) for table in tables], partial(_score, settings, model, tables)
        )
        counts |= {f"{table.name}/{table.protocol}": one for table, one in zip(tables, found, strict=True)}
    return counts


def _scoring_model(settings: Settings, table: outputs.Scored) -> str:
    if not table.tuned:
        return outputs.ranking_model(outputs.for_table(settings, table), settings.ranker.model)
    return str(workspace_of(settings).ranker_model(f"{table.ranker}-seed{table.seed}"))


def _score(
    settings: Settings, model: str, tables: Sequence[outputs.Scored], todo: Sequence[int], directories: Sequence[Path]
) -> list[dict[str, Any]]:
    from notellm2_ray.infer.score import ScoreTable
    from notellm2_ray.infer.score import score_candidates as work
    from notellm2_ray.infer.score_questions import Controls

    connect(settings.ray)
    asked = []
    for number, directory in zip(todo, directories, strict=True):
        table = tables[number]
        own = outputs.for_table(settings, table)
        workspace = ranking_workspace(own)
        asked.append(
            ScoreTable(
                settings.ranker.model_copy(update={"variant": table.ranker}),
                workspace.examples(table.history or "test"),
                workspace.candidates(table.protocol),
                _preferences(own, table.ranker, table.history),
                directory,
                Controls(
                    table.control == "shuffled_image",
                    table.control == "other_preference",
                    drawn_with(own, workspace, "scores"),
                ),
                settings.prompts.language,
            )
        )
    return work(model, settings.generation, workspace_of(settings).notes, asked)


def eval_ranking(settings: Settings) -> dict[str, Any]:
    """Compare all rankers and baselines by AUC, HR, MRR and NDCG; print the tables and write the report."""
    from notellm2_ray.evaluate.front_page import write_front_page
    from notellm2_ray.pipeline.ranking_comparison import compare_ranking

    workspace, tables = workspace_of(settings), outputs.scored(settings)
    missing = [f"{table.name}/{table.protocol}" for table in tables if not outputs.scores(settings, table).complete]
    if missing:
        raise OutputError(
            f"{', '.join(missing)} have not scored the candidates with these settings: run score-candidates, or "
            "`notellm2 run-ranking` for everything"
        )
    homes = {table: ranking_workspace(outputs.for_table(settings, table)) for table in tables}
    paths = {table: home.score_table(table.name, table.protocol) for table, home in homes.items()}
    counts = run_stage(
        outputs.ranking_evaluation(settings), lambda output: compare_ranking(settings, workspace, paths, output)
    )
    print((workspace.ranking_report / "table.txt").read_text(encoding="utf-8"))
    write_front_page(workspace.report)
    print(f"report: {workspace.report / 'index.html'}")
    return counts


def planned_sequences(settings: Settings) -> list[Planned]:
    return [outputs.sequences(settings)]


def planned_tiny_mllm(settings: Settings) -> list[Planned]:
    """The tiny MLLM, if the settings use it."""
    return [outputs.tiny_mllm(settings)] if outputs.uses_tiny_mllm(settings) else []


def planned_image_summaries(settings: Settings) -> list[Planned]:
    return [outputs.image_summaries(settings)]


def planned_preferences(settings: Settings) -> list[Planned]:
    return [outputs.preferences(settings, history) for history in outputs.preference_histories(settings)]


def planned_ranker(settings: Settings) -> list[Planned]:
    return [outputs.ranker(settings)]


def planned_scores(settings: Settings) -> list[Planned]:
    return [outputs.scores(settings, table) for table in outputs.scored(settings)]


def planned_evaluation(settings: Settings) -> list[Planned]:
    return [outputs.ranking_evaluation(settings)]


def each_with_tiny_mllm(settings: Settings) -> Iterator[Settings]:
    """The settings of each seed with a tiny multimodal LLM of its own, if any step of a run reads it."""
    if outputs.needs_tiny_mllm(settings):
        yield from each_with_own(settings, "tiny_mllm")


def each_with_image_summaries(settings: Settings) -> Iterator[Settings]:
    """The settings of each seed with summaries of its own, if any compared ranker or baseline reads them."""
    if outputs.needs_image_summaries(settings):
        yield from each_with_own(settings, "image_summaries")


def each_preference_variant(settings: Settings) -> Iterator[Settings]:
    """Settings of each variant of preferences that the compared rankers need, for each seed with its own."""
    for each in each_with_own(settings, "preferences"):
        for variant in outputs.preference_variants(settings):
            yield outputs.for_preferences(each, variant)


def tuning_size(settings: Settings) -> str:
    tune = settings.tune
    return (
        f"tuning: {tune.num_workers} rank(s) with {tune.cpus_per_worker:g} CPU(s) and {tune.gpus_per_worker:g} GPU(s) "
        f"each, {tune.batch_size} prompts a step, {tune.epochs:g} epochs"
    )


def generation_size(settings: Settings) -> str:
    engine = settings.generation
    return f"generation: {engine.engines} vLLM engine(s) with {engine.gpus_per_engine:g} GPU(s) each"


def tuning_memory(settings: Settings) -> list[str]:
    from notellm2_ray.pipeline.training_memory import ranker_memory

    return ranker_memory(settings)


def generation_memory(settings: Settings, model: str) -> list[str]:
    from notellm2_ray.pipeline.engine_memory import engine_memory

    return engine_memory(settings, model)
