"""GRU4Rec on frozen vectors of the notes' image summaries instead of note ids."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline, Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.baselines.ranking.sequential.scores import sequential_scores


def _scores(data: RankingData, protocol: ProtocolData) -> Scores:
    from notellm2_ray.baselines.ranking.sequential.features import text_features

    model = data.settings.model
    features = data.once(
        "summary features",
        lambda: text_features(data.summaries(), data.llm, attention=model.attention, revision=model.revision),
    )
    return sequential_scores("gru4rec_summary", data, protocol, features)


def _remark(data: RankingData) -> str:
    return f"gru4rec_summary: mean of the last states of {data.llm} over the image summary."


BASELINE = RankingBaseline(_scores, needs=frozenset({"image_summaries", "llm"}), remark=_remark)
