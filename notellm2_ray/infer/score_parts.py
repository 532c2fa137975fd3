"""Scoring cut into parts of whole examples: how it is cut, and what is kept of each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.schema import SCORE_SCHEMA
from notellm2_ray.infer.parts import FinishedPart, PartStore, write_whole_parquet


class CandidatePart(NamedTuple):
    """The candidates of some examples, one example after the other."""

    part_id: str
    places: list[int]  # rows of the candidates' file
    table: int = 0  # which of the tables that are scored together


@dataclass(frozen=True, kw_only=True)
class ScoredPart(FinishedPart):
    """A finished part's counts."""

    scored: int
    quarantined: int
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were found in the prefix cache instead of computed

    @property
    def candidates(self) -> int:
        """Candidates that are done with."""
        return self.scored + self.quarantined


def scored_parts(output: Path) -> PartStore[ScoredPart]:
    """The parts of a table of scores: rows of SCORE_SCHEMA."""
    return PartStore(output, ScoredPart)


def plan_parts(example_of: np.ndarray, requests: int, made_by: str) -> list[CandidatePart]:
    """Cut candidates into parts of whole examples.

    Args:
        example_of: (R,) the example of each candidate.
        requests: the least number of candidates in a part (the last part may have fewer).
        made_by: fingerprint of all that shapes a score; it is part of each part's id.
    """
    order = np.argsort(example_of, kind="stable")
    ends = np.flatnonzero(np.diff(example_of[order], append=-1)) + 1  # where each example's candidates end
    parts: list[CandidatePart] = []
    begin = 0
    for end in ends.tolist():
        if end - begin >= requests or end == len(order):
            digest = fingerprint(made_by, begin, end)[:12]
            parts.append(CandidatePart(f"{len(parts):06d}-{digest}", order[begin:end].tolist()))
            begin = end
    return parts


def compile_scores(store: PartStore[ScoredPart], parts: Sequence[CandidatePart]) -> int:
    """Write ``scores.parquet``, the parts one after the other; returns the number of rows."""
    tables = list(store.tables(part.part_id for part in parts))
    table = pa.concat_tables(tables) if tables else SCORE_SCHEMA.empty_table()
    write_whole_parquet(store.output / "scores.parquet", table)
    return len(table)
