"""The table of stages, with what each needs and so the order in which a run executes them.

The verbs of the command line, ``--dry-run``, the runs, the scripts in ``jobs/`` and the documentation's list of steps
are all derived from it. :func:`add_stage` adds a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline import embedders, ranking_outputs, recall_outputs, seeds
from notellm2_ray.pipeline import ranking_stages as ranking
from notellm2_ray.pipeline import recall_stages as recall
from notellm2_ray.pipeline.stage import Planned, Stage


def _tiny_embedder_parts(settings: Settings) -> tuple[str, ...]:
    return ("build-tiny",) if ranking_outputs.needs_tiny_embedder_parts(settings) else ()


def _each_tiny(settings: Settings) -> Iterator[Settings]:
    """Settings of each seed with tiny models of its own, in the recall half or for baselines of the other half."""
    first, *others = settings.evaluate.seeds
    if ranking_outputs.needs_tiny_embedder_parts(settings):
        others = list(dict.fromkeys([*others, *settings.ranking.seeds]))
    yield seeds.with_recall_seed(settings, first)
    for seed in others:
        if seeds.recall_workspace(one := seeds.with_recall_seed(settings, seed)).own:
            yield one


# Each stage comes after those that it needs.
STAGES: list[Stage] = [
    Stage(
        "prepare",
        "read and check the source tables, quarantine broken rows",
        ("source", "prepare"),
        needs=(),
        outputs=lambda settings: [recall_outputs.prepared(settings)],
        work=recall.prepare,
    ),
    Stage(
        "mine-pairs",
        "mine related notes from the event log and split them",
        ("pairs", "split"),
        needs=("prepare",),
        outputs=lambda settings: [recall_outputs.pairs(settings)],
        work=recall.mine_pairs,
    ),
    Stage(
        "build-tiny",
        "train a small tokenizer, LLM and CLIP from scratch, if model.llm or model.vision is 'tiny'",
        ("tiny",),
        needs=("mine-pairs",),
        outputs=recall.planned_tiny,
        work=recall.build_tiny,
        in_a_run=_each_tiny,
    ),
    Stage(
        "train-embedder",
        "train the note embedder",
        ("model", "train", "embedders"),
        needs=("mine-pairs", "build-tiny"),
        outputs=recall.planned_embedder,
        work=recall.train_embedder,
        in_a_run=embedders.selected_embedders,
        size=recall.training_size,
        memory=recall.training_memory,
    ),
    Stage(
        "mine-negatives",
        "find notes that the embedder puts near a training query, though nothing relates them",
        ("negatives",),
        needs=("prepare", "mine-pairs", "train-embedder"),
        outputs=recall.planned_negatives,
        work=recall.mine_negatives,
    ),
    Stage(
        "embed-notes",
        "embed every note with the trained embedder",
        ("embed",),
        needs=("prepare", "train-embedder"),
        outputs=recall.planned_embeddings,
        work=recall.embed_notes,
        in_a_run=lambda settings: [embedders.chosen_embedder(settings)],
        size=recall.embedding_size,
    ),
    Stage(
        "build-index",
        "build the ANN index and measure its recall",
        ("index",),
        needs=("embed-notes",),
        outputs=recall.planned_index,
        work=recall.build_index,
        in_a_run=lambda settings: [embedders.chosen_embedder(settings)],
    ),
    Stage(
        "export-ids",
        "write semantic ids of the embedded notes: residual k-means codes",
        ("ids",),
        needs=("embed-notes",),
        outputs=recall.planned_ids,
        work=recall.export_ids,
        in_a_run=lambda settings: [embedders.chosen_embedder(settings)],
    ),
    Stage(
        "eval-retrieval",
        "compare the trained embedders and baselines on the test pairs",
        ("evaluate",),
        needs=("prepare", "mine-pairs", "train-embedder"),
        outputs=recall.planned_evaluation,
        work=recall.eval_retrieval,
        in_a_run=lambda settings: [embedders.chosen_embedder(settings)],
    ),
    Stage(
        "make-sequences",
        "cut users' events into histories, blocks, targets and candidates",
        ("sequences", "candidates"),
        needs=("prepare",),
        outputs=ranking.planned_sequences,
        work=ranking.make_sequences,
        in_a_run=lambda settings: seeds.each_with_own(settings, "sequences"),
    ),
    Stage(
        "build-tiny-mllm",
        "train a small multimodal LLM from scratch, if a model of the recommender is 'tiny'",
        ("tiny",),
        needs=("prepare",),
        outputs=ranking.planned_tiny_mllm,
        work=ranking.build_tiny_mllm,
        in_a_run=ranking.each_with_tiny_mllm,
    ),
    Stage(
        "summarize-images",
        "summarise every note's image in words with an MLLM",
        ("summaries", "generation", "prompts"),
        needs=("prepare", "build-tiny-mllm"),
        outputs=ranking.planned_image_summaries,
        work=ranking.summarize_images,
        in_a_run=ranking.each_with_image_summaries,
        size=ranking.generation_size,
        memory=lambda settings: ranking.generation_memory(settings, settings.summaries.model),
    ),
    Stage(
        "summarize-preferences",
        "summarise each user's preferences in words, block by block",
        ("preferences", "generation", "prompts"),
        needs=("make-sequences", "build-tiny-mllm", "summarize-images"),
        outputs=ranking.planned_preferences,
        work=ranking.summarize_preferences,
        in_a_run=ranking.each_preference_variant,
        size=ranking.generation_size,
        memory=lambda settings: ranking.generation_memory(settings, settings.preferences.model),
    ),
    Stage(
        "train-ranker",
        "fine-tune the MLLM that answers yes or no to a candidate",
        ("ranker", "tune", "prompts"),
        needs=("make-sequences", "build-tiny-mllm", "summarize-preferences"),
        outputs=ranking.planned_ranker,
        work=ranking.train_ranker,
        in_a_run=ranking_outputs.rankers,
        size=ranking.tuning_size,
        memory=ranking.tuning_memory,
    ),
    Stage(
        "score-candidates",
        "score the test candidates with the tuned and untuned models",
        ("ranker", "generation", "prompts"),
        needs=("make-sequences", "build-tiny-mllm", "summarize-preferences", "train-ranker"),
        outputs=ranking.planned_scores,
        work=ranking.score_candidates,
        size=ranking.generation_size,
        memory=lambda settings: ranking.generation_memory(settings, settings.ranker.model),
    ),
    Stage(
        "eval-ranking",
        "compare the rankers and baselines on the test candidates",
        ("ranking",),
        needs=("prepare", "make-sequences", "summarize-images", "score-candidates"),
        outputs=ranking.planned_evaluation,
        work=ranking.eval_ranking,
        also_needs=_tiny_embedder_parts,
    ),
]


@dataclass(frozen=True)
class Run:
    """Several stages under one verb: those named in ``ends`` and everything that they need."""

    verb: str
    help: str
    ends: tuple[str, ...]


RUNS = (
    Run(
        "run-retrieval",
        "run all steps of recall, for every embedder and seed of `evaluate`",
        ("build-index", "eval-retrieval"),
    ),
    Run(
        "run-ranking",
        "run all steps of ranking, for every variant and seed of `ranking`",
        ("eval-ranking",),
    ),
    Run("run", "run recall and ranking, and write the report", ("build-index", "eval-retrieval", "eval-ranking")),
)


def add_stage(stage: Stage) -> None:
    """Add a row to the table, and so a verb to the command line.

    Raises:
        ValueError: the verb is taken, or the stage needs one that is not in the table.
    """
    known = [one.verb for one in STAGES]
    if stage.verb in known or stage.verb in [run.verb for run in RUNS]:
        raise ValueError(f"there already is a verb {stage.verb}")
    if unknown := set(stage.needs) - set(known):
        raise ValueError(f"stage {stage.verb} needs {', '.join(sorted(unknown))}, which is not in the table of stages")
    STAGES.append(stage)


def stage_of(verb: str) -> Stage | None:
    """The stage of a verb; None if the verb is not a stage's."""
    return next((stage for stage in STAGES if stage.verb == verb), None)


def run_of(verb: str) -> Run | None:
    """The run of a verb; None if the verb is not a run's."""
    return next((run for run in RUNS if run.verb == verb), None)


def stages_of(verb: str, settings: Settings) -> list[Stage]:
    """The stages that a verb executes, in order: the one it names, or all that its run needs."""
    run = run_of(verb)
    if run is None:
        return [stage for stage in STAGES if stage.verb == verb]
    wanted = set(run.ends)
    for stage in reversed(STAGES):
        if stage.verb in wanted:
            wanted |= {*stage.needs, *stage.also_needs(settings)}
    return [stage for stage in STAGES if stage.verb in wanted]


def planned(verb: str, settings: Settings) -> Iterator[tuple[Stage, Planned]]:
    """Every output that a verb would write, in order."""
    whole = run_of(verb) is not None
    for stage in stages_of(verb, settings):
        for each in stage.in_a_run(settings) if whole else (settings,):
            for one in stage.outputs(each):
                yield stage, one


def writer_of(directory: Path, settings: Settings) -> str | None:
    """The verb of the stage that writes a directory in a run of these settings."""
    for stage in STAGES:
        for each in stage.in_a_run(settings):
            if any(one.directory == directory for one in stage.outputs(each)):
                return stage.verb
    return None


def do(verb: str, settings: Settings, *, leave_out: Sequence[str] = ()) -> None:
    """Execute a stage, or all stages of a run one after another."""
    whole = run_of(verb) is not None
    for stage in stages_of(verb, settings):
        if stage.verb not in leave_out:
            for each in stage.in_a_run(settings) if whole else (settings,):
                stage.work(each)
