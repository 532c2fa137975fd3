"""Popularity: every query gets the pool in the order of its clicks in the test period."""

from __future__ import annotations

import pyarrow.parquet as pq

from notellm2_ray.baselines.recall.baseline import Ranks, RecallBaseline, RecallData


def _ranks(data: RecallData) -> Ranks:
    table = pq.read_table(data.workspace.pair_popularity)
    clicks = dict(zip(table.column("note_id").to_pylist(), table.column("clicks").to_pylist(), strict=True))
    return {None: data.task.ranks_by_note(clicks)}


BASELINE = RecallBaseline(
    "-", _ranks, "it knows the test clicks, from which the pairs were mined, so it is optimistic."
)
