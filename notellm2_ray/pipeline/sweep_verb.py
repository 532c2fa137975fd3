"""`notellm2 sweep`: how the first ranker's figures change with one setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from notellm2_ray.core.cluster import connect
from notellm2_ray.core.config import apply_overrides, build, to_plain
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.stage import Stage, workspace_of
from notellm2_ray.pipeline.sweep import SWEEPS, figures_of, run_sweep
from notellm2_ray.pipeline.table import STAGES, do

SWEEP_VERB = "sweep"
SWEEP_HELP = "tune and test the first ranker once per block size or context length, with Ray Tune"
_SHARED = ("build-tiny-mllm", "summarize-images")  # shared by the trials, beside the prepared notes


def sweep_stages(settings: Settings) -> list[Stage]:
    """The stages that run once, before the trials."""
    return [stage for stage in STAGES if stage.verb in _SHARED and list(stage.in_a_run(settings))]


def sweep(settings: Settings) -> None:
    """Run the trials of ``ranking.sweep`` and print their figures; the next report has a plot of them."""
    connect(settings.ray)
    for stage in sweep_stages(settings):
        for each in stage.in_a_run(settings):
            stage.work(each)
    found = run_sweep(SWEEPS[settings.ranking.sweep], partial(_trial, settings), workspace_of(settings).root)
    for point in found["points"]:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in point["metrics"].items())
        print(f"{found['parameter']} = {point['value']}: {figures or point['error']}")


def _trial(settings: Settings, overrides: Mapping[str, int], home: Path) -> dict[str, float]:
    first = settings.ranking.rankers[0]
    fixed = [f"workspace={home}", f"ranking.rankers=[{first}]", "ranking.controls=[]", "ranking.baselines=[random]"]
    changed = [*fixed, *(f"{name}={value}" for name, value in overrides.items())]
    trial: Settings = build(Settings, apply_overrides(to_plain(settings), changed))
    do("run-ranking", trial, leave_out=("prepare",))
    results = json.loads((Workspace(home).ranking_report / "results.json").read_text(encoding="utf-8"))
    return figures_of(results, first)


def sweep_size(settings: Settings) -> str:
    one = SWEEPS[settings.ranking.sweep]
    return (
        f"trials: run-ranking of {settings.ranking.rankers[0]} with {one.parameter} = "
        f"{', '.join(map(str, one.values))}, each in a workspace below {workspace_of(settings).sweeps / one.name}"
    )
