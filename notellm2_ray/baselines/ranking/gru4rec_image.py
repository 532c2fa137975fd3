"""GRU4Rec on frozen vectors of the notes' images instead of note ids."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline, Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.baselines.ranking.sequential.scores import sequential_scores


def _scores(data: RankingData, protocol: ProtocolData) -> Scores:
    from notellm2_ray.baselines.ranking.sequential.features import image_features

    features = data.once("image features", lambda: image_features(data.images(), data.image_tower))
    return sequential_scores("gru4rec_image", data, protocol, features)


def _remark(data: RankingData) -> str:
    return f"gru4rec_image: pooled vectors of {data.image_tower}."


BASELINE = RankingBaseline(_scores, needs=frozenset({"image_tower"}), remark=_remark)
