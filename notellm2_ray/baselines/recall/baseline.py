"""What a recall baseline is: what it reads of a note, and a function from test pairs to ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from notellm2_ray.baselines.kept import Kept
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.evaluate.recall.task import RetrievalTask

# Seed to (Q,) ranks, one per test pair; a deterministic baseline has the one seed None.
Ranks = Mapping[int | None, np.ndarray]


@dataclass(frozen=True)
class RecallData(Kept):
    """What a recall baseline may read.

    Attributes:
        task: the test pairs over the pool of notes that are ranked.
        notes: note id to note, for every query, target and note of the pool.
        workspace: where the mined pairs and the prepared notes and events lie.
        settings: those of the run.
    """

    task: RetrievalTask
    notes: Mapping[str, Note]
    workspace: Workspace
    settings: Settings

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that a random baseline gives ranks for."""
        return self.settings.evaluate.seeds


@dataclass(frozen=True)
class RecallBaseline:
    """A row of the recall tables that is not an embedder.

    Attributes:
        inputs: what of a note it reads: "text", "image", "multimodal", or "-" for nothing.
        ranks: gives the rank of each pair's target among the pool: 1 is best, the query is left out, and ties count
            against the target. ``data.task`` and :mod:`notellm2_ray.evaluate.recall.metrics` rank by scores.
        remark: what a reader of the table must know of the row; printed below it.
    """

    inputs: str
    ranks: Callable[[RecallData], Ranks]
    remark: str = ""
