"""Experiments: a user stays in one arm as long as the experiment keeps its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.serve import ArmSettings, RecommendSettings

CONTROL = "default"


class Arm(NamedTuple):
    """An arm's name and the settings of its recommendations."""

    name: str
    recommend: RecommendSettings


def arm_of(user_id: str, experiment: str, arms: Sequence[ArmSettings], defaults: RecommendSettings) -> Arm:
    """A user's arm, by a hash of experiment and user: no state is needed, and a new experiment draws users anew."""
    if not arms:
        return Arm(CONTROL, defaults)
    point = stream_seed(0, "experiment", experiment, user_id) / 2**63
    for arm in arms:
        point -= arm.share
        if point < 0:
            break
    given = arm.model_dump(exclude={"name", "share"})
    changes = {name: value for name, value in given.items() if value is not None}
    return Arm(arm.name, defaults.model_copy(update=changes))
