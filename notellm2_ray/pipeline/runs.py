"""Doing what a verb of the pipeline says: one stage, a sweep, or a run of many stages."""

from __future__ import annotations

from pathlib import Path

from notellm2_ray.core.errors import MissingOutputError, OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.halves import run_halves
from notellm2_ray.pipeline.stage import workspace_of
from notellm2_ray.pipeline.sweep_verb import SWEEP_VERB, sweep
from notellm2_ray.pipeline.table import do, writer_of


def run_verb(verb: str, settings: Settings) -> None:
    """Do a stage, a run or a sweep; `run` does both halves at the same time.

    Raises:
        OutputError: an output that is read is not there; the message says which verb makes it.
    """
    try:
        if verb == SWEEP_VERB:
            sweep(settings)
        elif verb == "run":
            _both_halves(settings)
        else:
            do(verb, settings)
    except MissingOutputError as error:
        writer = writer_of(Path(str(error.directory)), settings)
        if writer is None:
            raise
        raise OutputError(
            f"{verb} reads {error.directory}, which is not there or not finished: run `notellm2 {writer}` first, with "
            "the same settings"
        ) from None


def _both_halves(settings: Settings) -> None:
    from notellm2_ray.evaluate.front_page import write_front_page

    workspace = workspace_of(settings)
    do("prepare", settings)
    run_halves(settings, workspace.root)
    write_front_page(workspace.report)  # halves that end at the same moment may each miss the other's results
