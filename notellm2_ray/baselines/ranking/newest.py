"""Newest: the later a candidate was created, the higher it stands."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from notellm2_ray.baselines.ranking.baseline import RankingBaseline, Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.core.errors import DataError


def _scores(data: RankingData, protocol: ProtocolData) -> Scores:
    return {None: protocol.task.scores_by_note(_created(data))}


def _created(data: RankingData) -> dict[str, int]:
    """When each note was created, in microseconds.

    Raises:
        DataError: no note has a time.
    """
    notes = ds.dataset(data.workspace.notes).to_table(columns=["note_id", "created_at"])
    dated = notes.filter(pc.is_valid(notes["created_at"]))
    if not len(dated):
        raise DataError("the row newest needs notes with created_at: leave it out of ranking.baselines")
    created = dated["created_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    return dict(zip(dated["note_id"].to_pylist(), created.to_pylist(), strict=True))


BASELINE = RankingBaseline(_scores)
