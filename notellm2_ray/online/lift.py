"""Results of an experiment so far: clicks in each arm, from the users' database of a workspace."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.evaluate.lift import click_lift
from notellm2_ray.pipeline.stage import workspace_of
from notellm2_ray.users.exposures import ArmClicks, clicks_by_arm

_COLUMNS = ("arm", "users", "requests", "exposures", "clicks", "rate", "lift", "95% interval", "p")


def lift_report(settings: Settings) -> str:
    """`notellm2 lift`: a row for each arm of ``serve.experiment``, with its lift over the first arm.

    The first arm is the first of ``serve.arms`` that showed any note, or the first by name if ``serve.arms`` is empty.
    The service may be running.

    Raises:
        OutputError: there is no users' database yet, or it cannot be read.
    """
    path = settings.serve.users_file or workspace_of(settings).serving / "users.sqlite"
    experiment = settings.serve.experiment
    order = {arm.name: place for place, arm in enumerate(settings.serve.arms)}
    arms = _read(path, experiment, settings.sequences.positive_actions)
    arms.sort(key=lambda one: order.get(one.arm, len(order)))  # stable: other arms stay in order of name
    if not arms:
        return f"experiment {experiment}: no note was shown to a user yet"
    rows: list[tuple[str, ...]] = [_COLUMNS]
    notes: list[str] = []
    for arm in arms:
        lift: tuple[str, str, str] = ("", "", "")
        if arm is not arms[0]:
            try:
                lift = _lift(arm, arms[0], settings.seed)
            except DataError as error:
                notes.append(f"{arm.arm}: {error}")
        shown, clicked = int(arm.shown.sum()), int(arm.clicked.sum())
        counts = (len(arm.shown), arm.requests, shown, clicked)
        rows.append((arm.arm, *(f"{count:,}" for count in counts), f"{clicked / shown:.2%}", *lift))
    return "\n".join([f"experiment {experiment}", *_aligned(rows), *notes])


def _read(path: Path, experiment: str, actions: Sequence[str]) -> list[ArmClicks]:
    if not path.exists():
        raise OutputError(f"{path} is not there: `notellm2 serve` creates it, and recommendations fill it")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            return clicks_by_arm(db, experiment, actions)
    except sqlite3.Error as error:
        raise OutputError(f"{path} cannot be read as the users' database: {error}") from error


def _lift(arm: ArmClicks, base: ArmClicks, seed: int) -> tuple[str, str, str]:
    found = click_lift(arm.shown, arm.clicked, base.shown, base.clicked, seed=seed)
    return f"{found.lift:+.1%}", f"{found.low:+.1%} to {found.high:+.1%}", f"{found.p_value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return lines
