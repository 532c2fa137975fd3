"""What a command would do, without doing it (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import Output, read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline import ranking_outputs as ranking
from notellm2_ray.pipeline import recall_outputs as outputs
from notellm2_ray.pipeline.recall_comparison import embedders
from notellm2_ray.pipeline.sweep import SWEEPS

Make = Callable[[], Output]
_TRAIN = "train-embedder"
_RETRIEVAL = {"mine-pairs", "build-tiny", _TRAIN, "embed-notes", "build-index", "eval-retrieval"}
_RANKING = {
    "make-sequences",
    "build-tiny-mllm",
    "summarize-images",
    "summarize-preferences",
    "train-ranker",
    "score-candidates",
}


def plan(settings: Settings, verb: str) -> str:
    """One line per stage of ``verb``: done, to continue, to do, or waiting for a stage before it; and its size."""
    lines = [f"plan of `notellm2 {verb}`"]
    undone: list[str] = []
    for label, make in _outputs(settings, verb):
        state, done = _state(make, any(_depends(label, other) for other in undone))
        if not done:
            undone.append(label)
        lines.append(f"  {label:50s} {state}")
    return "\n".join([*lines, *_size(settings, verb)])


def _depends(label: str, other: str) -> bool:
    """Whether a stage reads what another that stands before it makes."""
    kind, other_kind = label.split()[0], other.split()[0]
    if kind == other_kind or (kind in _RANKING and other_kind in _RETRIEVAL):
        return False
    if (kind, other_kind) == ("score-candidates", "train-ranker"):
        table, ranker = label.split()[1], other.split()[1]
        return table == ranker or table.startswith(f"{ranker}-")
    return True


def _outputs(settings: Settings, verb: str) -> list[tuple[str, Make]]:
    """What a verb would write, by name; an output whose inputs are not there yet cannot be made (OutputError)."""
    own: dict[str, Make] = {
        "prepare": partial(outputs.prepared, settings),
        "mine-pairs": partial(outputs.pairs, settings),
        "build-tiny": partial(outputs.tiny, settings),
        _TRAIN: partial(outputs.embedder, settings),
        "embed-notes": partial(outputs.embeddings, settings, "all"),
        "build-index": partial(outputs.ann_index, settings),
        "eval-retrieval": partial(outputs.evaluation, settings, list(embedders(settings))),
        "make-sequences": partial(ranking.sequences, settings),
        "build-tiny-mllm": partial(ranking.tiny_mllm, settings),
        "summarize-images": partial(ranking.image_summaries, settings),
        "summarize-preferences": partial(ranking.preferences, settings),
        "train-ranker": partial(ranking.ranker, settings),
        "eval-ranking": partial(ranking.ranking_evaluation, settings),
    }
    if verb in own:
        return [(verb, own[verb])]
    found = [("prepare", own["prepare"])] if verb not in ("score-candidates", "sweep") else []
    if verb in ("run", "run-retrieval"):
        found += [(name, own[name]) for name in ("mine-pairs", "build-tiny")]
        found += [(f"{_TRAIN} {each.embedder_name}", partial(outputs.embedder, each)) for each in embedders(settings)]
        found += [(name, own[name]) for name in ("embed-notes", "build-index", "eval-retrieval")]
    if verb in ("run", "run-ranking"):
        found += _ranking_outputs(settings, own)
    if verb == "score-candidates":
        found += _score_outputs(settings)
    if verb == "sweep":
        found += [(name, own[name]) for name in _models_and_summaries(settings)]
    return found


def _ranking_outputs(settings: Settings, own: dict[str, Make]) -> list[tuple[str, Make]]:
    found = [(name, own[name]) for name in ("make-sequences", *_models_and_summaries(settings))]
    for variant in ranking.preference_variants(settings):
        found.append(
            (
                f"summarize-preferences {variant}",
                partial(ranking.preferences, ranking.for_preferences(settings, variant)),
            )
        )
    for each in ranking.rankers(settings):
        found.append((f"train-ranker {ranking.ranker_name(each)}", partial(ranking.ranker, each)))
    return [*found, *_score_outputs(settings), ("eval-ranking", own["eval-ranking"])]


def _models_and_summaries(settings: Settings) -> list[str]:
    names = ["build-tiny-mllm"] if ranking.uses_tiny_mllm(settings) else []
    return names + (["summarize-images"] if ranking.needs_image_summaries(settings) else [])


def _score_outputs(settings: Settings) -> list[tuple[str, Make]]:
    return [
        (f"score-candidates {table.name} {table.protocol}", partial(ranking.scores, settings, table))
        for table in ranking.scored(settings)
    ]


def _state(make: Callable[[], Output], waits: bool) -> tuple[str, bool]:
    """What is to be done for an output, and whether that is nothing; ``waits``: on a stage before it."""
    try:
        output = make()
    except OutputError:
        return "to do, after the stages before it", False
    if waits:
        return f"to do, after the stages before it ({output.directory})", False
    if output.complete:
        return f"already there ({output.directory})", True
    return f"{'to continue' if output.resumable else 'to do'} ({output.directory})", False


def _size(settings: Settings, verb: str) -> list[str]:
    lines = []
    if verb in ("train-embedder", "run-retrieval", "run"):
        train = settings.train
        share = train.batch_pairs // train.num_workers
        lines.append(
            f"training: {train.num_workers} rank(s) with {train.cpus_per_worker:g} CPU(s) and "
            f"{train.gpus_per_worker:g} GPU(s) each, {share} pairs ({2 * share} notes) a rank and step, "
            f"{_steps(settings)}"
        )
    if verb == "sweep":
        one = SWEEPS[settings.ranking.sweep]
        homes = settings.workspace / "sweeps" / one.name
        lines.append(
            f"trials: run-ranking of {settings.ranking.rankers[0]} with {one.parameter} = "
            f"{', '.join(map(str, one.values))}, each in a workspace below {homes}"
        )
    if verb in ("train-ranker", "run-ranking", "run"):
        tune = settings.tune
        lines.append(
            f"tuning: {tune.num_workers} rank(s) with {tune.cpus_per_worker:g} CPU(s) and {tune.gpus_per_worker:g} "
            f"GPU(s) each, {tune.batch_size} prompts a step, {tune.epochs:g} epochs"
        )
    if verb in ("summarize-images", "summarize-preferences", "score-candidates", "run-ranking", "run", "sweep"):
        engine = settings.generation
        lines.append(f"generation: {engine.engines} vLLM engine(s) with {engine.gpus_per_engine:g} GPU(s) each")
    if verb in ("embed-notes", "run-retrieval", "run"):
        embed = settings.embed
        lines.append(
            f"embedding: {embed.actors} actor(s) with {embed.cpus_per_actor:g} CPU(s) and {embed.gpus_per_actor:g} "
            f"GPU(s) each, blocks of {embed.block_rows} notes, {_rows(settings)}"
        )
    return lines


def _steps(settings: Settings) -> str:
    try:
        pairs = read_manifest(settings.workspace / "pairs")["counts"]["train_pairs"]
    except OutputError:
        return "steps known once pairs are mined"
    steps = settings.train.epochs * (pairs // settings.train.batch_pairs)
    steps = min(steps, settings.train.max_steps or steps)
    return f"{pairs} pairs: {steps} steps"


def _rows(settings: Settings) -> str:
    try:
        return f"{read_manifest(settings.workspace / 'prepared')['counts']['notes']} notes"
    except OutputError:
        return "notes counted once prepared"
