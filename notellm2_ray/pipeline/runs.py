"""Doing what a verb of the pipeline says: one stage, or a run of many."""

from __future__ import annotations

from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.halves import run_halves
from notellm2_ray.pipeline.stage import workspace_of
from notellm2_ray.pipeline.sweep_verb import SWEEP_VERB, sweep
from notellm2_ray.pipeline.table import do


def run_verb(verb: str, settings: Settings) -> None:
    """Do a stage, a run or a sweep; `run` does both halves at the same time."""
    if verb == SWEEP_VERB:
        sweep(settings)
        return
    if verb != "run":
        do(verb, settings)
        return
    from notellm2_ray.evaluate.front_page import write_front_page

    workspace = workspace_of(settings)
    do("prepare", settings)
    run_halves(settings, workspace.root)
    write_front_page(workspace.report)  # halves that end at the same moment may each miss the other's results
