"""What every training seed has of its own.

With several ``evaluate.seeds`` or ``ranking.seeds`` everything random is drawn anew for each: what training draws
(weights, order, dropout), the tiny models and what they write (``tiny.per_seed``), and the candidates' negatives
(``candidates.per_seed``). So deviations and tests over seeds are over all of it. The data, their split and what
pretrained models write are shared.

What the first seed draws lies where that of a run with one seed does; what another draws lies in ``seeds/SEED``. A seed
that is not among those compared shares the first one's.
"""

from __future__ import annotations

from collections.abc import Iterator

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.stage import workspace_of


def recall_workspace(settings: Settings) -> Workspace:
    """The workspace of ``train.seed``: it may have tiny models of its own."""
    own = {"tiny"} if settings.train.seed in _seeds_with_tiny_models(settings) else ()
    return Workspace(workspace_of(settings).root, settings.train.seed, own)


def _seeds_with_tiny_models(settings: Settings) -> set[int]:
    """Seeds whose LLM and CLIP are their own; baselines of the ranking table read them too."""
    if not settings.tiny.per_seed:
        return set()
    return {*settings.evaluate.seeds[1:], *settings.ranking.seeds[1:]} - {settings.evaluate.seeds[0]}


def ranking_workspace(settings: Settings) -> Workspace:
    """The workspace of ``tune.seed``: what it has of its own follows from what is random before it."""
    own: set[str] = set()
    if settings.tune.seed in settings.ranking.seeds[1:]:
        if settings.candidates.per_seed:
            own |= {"sequences"}
        if settings.tiny.per_seed:
            own |= _written_by_tiny_models(settings)
        own |= {"scores"} if own else set()
    return Workspace(workspace_of(settings).root, settings.tune.seed, own)


def _written_by_tiny_models(settings: Settings) -> set[str]:
    own = set()
    if settings.summaries.model == "tiny":
        own |= {"tiny_mllm", "image_summaries"}
    if own or settings.preferences.model == "tiny":  # preferences are written from the summaries too
        own |= {"preferences", "preference_logs"}
    if "tiny" in (settings.preferences.model, settings.ranker.model):
        own |= {"tiny_mllm"}
    return own


def drawn_with(settings: Settings, workspace: Workspace, name: str) -> int:
    """The seed of a directory's draws: ``settings.seed``, or one derived from it where a seed has its own."""
    return stream_seed(settings.seed, "seed", workspace.seed) if name in workspace.own else settings.seed


def label_of(workspace: Workspace, name: str) -> str:
    """What tells a directory from the first seed's in a dry run: "seed43", or nothing."""
    return f"seed{workspace.seed}" if name in workspace.own else ""


def with_recall_seed(settings: Settings, seed: int) -> Settings:
    """The settings of one of ``evaluate.seeds``."""
    return settings.model_copy(update={"train": settings.train.model_copy(update={"seed": seed})})


def with_ranking_seed(settings: Settings, seed: int) -> Settings:
    """The settings of one of ``ranking.seeds``."""
    return settings.model_copy(update={"tune": settings.tune.model_copy(update={"seed": seed})})


def each_with_own(settings: Settings, name: str) -> Iterator[Settings]:
    """Settings of the first of ``ranking.seeds``, and of each other with a directory called ``name`` of its own."""
    first, *others = settings.ranking.seeds
    yield with_ranking_seed(settings, first)
    for seed in others:
        if name in ranking_workspace(one := with_ranking_seed(settings, seed)).own:
            yield one
