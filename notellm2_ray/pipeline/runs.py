"""Executes a verb of the pipeline: one stage, a run of several, or a sweep."""

from __future__ import annotations

from pathlib import Path

from notellm2_ray.core.errors import MissingOutputError, OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.halves import run_halves
from notellm2_ray.pipeline.stage import workspace_of
from notellm2_ray.pipeline.sweep_verb import SWEEP_VERB, sweep
from notellm2_ray.pipeline.table import do, writer_of


def run_verb(verb: str, settings: Settings) -> None:
    """Execute a verb; `run` executes both halves at the same time where possible.

    Raises:
        OutputError: an input is missing; the message names the verb that makes it.
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
            f"{verb} reads {error.directory}, which is missing or unfinished: run `notellm2 {writer}` first, with "
            "the same settings"
        ) from None


def _both_halves(settings: Settings) -> None:
    from notellm2_ray.evaluate.front_page import write_front_page

    workspace = workspace_of(settings)
    do("prepare", settings)
    run_halves(settings, workspace.root)
    write_front_page(workspace.report)  # halves that end at the same moment may each miss the other's results
