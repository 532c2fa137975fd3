"""What a command would do, without doing it (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from notellm2_ray import outputs
from notellm2_ray import ranking_outputs as ranking
from notellm2_ray.comparison import embedders
from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import Output, read_manifest
from notellm2_ray.core.settings import Settings

Make = Callable[[], Output]
_TRAIN = "train-embedder"


def plan(settings: Settings, verb: str) -> str:
    """One line per stage of ``verb``: done, to continue, to do, or waiting for a stage before it; and its size."""
    lines = [f"plan of `notellm2 {verb}`"]
    undone: list[str] = []
    for label, make in _outputs(settings, verb):
        # Embedders do not depend on each other; every other stage does on all that stand before it.
        waits = [other for other in undone if not (label.startswith(_TRAIN) and other.startswith(_TRAIN))]
        state, done = _state(make, bool(waits))
        if not done:
            undone.append(label)
        lines.append(f"  {label:50s} {state}")
    return "\n".join([*lines, *_size(settings, verb)])


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
    found = [("prepare", own["prepare"])] if verb != "score-candidates" else []
    if verb in ("run", "run-retrieval"):
        found += [(name, own[name]) for name in ("mine-pairs", "build-tiny")]
        found += [(f"{_TRAIN} {each.embedder_name}", partial(outputs.embedder, each)) for each in embedders(settings)]
        found += [(name, own[name]) for name in ("embed-notes", "build-index", "eval-retrieval")]
    if verb in ("run", "run-ranking"):
        found += _ranking_outputs(settings, own)
    if verb == "score-candidates":
        found += _score_outputs(settings)
    return found


def _ranking_outputs(settings: Settings, own: dict[str, Make]) -> list[tuple[str, Make]]:
    names = ["make-sequences"]
    names += ["build-tiny-mllm"] if ranking.uses_tiny_mllm(settings) else []
    names += ["summarize-images"] if ranking.needs_image_summaries(settings) else []
    found = [(name, own[name]) for name in names]
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
