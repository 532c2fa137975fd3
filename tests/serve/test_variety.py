"""Near duplicates folded and maximal marginal relevance, against plain twins; and as the API answers them."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.core.settings.serve import LimitSettings, ServeSettings
from notellm2_ray.live.columns import NoteBatch
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.serve.deployments.gateway import Gateway
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.schemas import RecommendRequest, SimilarRequest
from notellm2_ray.serve.http.similar import find_similar
from notellm2_ray.serve.http.user_routes import Recommendation
from notellm2_ray.serve.variety import arrange, diverse, fold


def units(num, dim=4, seed=0):
    rows = np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosine(one, other):
    return math.fsum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def plain_fold(vectors, above, known):
    kept, duplicates, of_known = [], {}, []
    for row, vector in enumerate(vectors):
        if any(cosine(vector, one) >= above for one in known):
            of_known.append(row)
            continue
        near = [one for one in kept if cosine(vector, vectors[one]) >= above]
        if near:
            best = max(near, key=lambda one: cosine(vector, vectors[one]))
            duplicates.setdefault(best, []).append(row)
        else:
            kept.append(row)
    return kept, duplicates, of_known


def plain_mmr(relevance, vectors, k, diversity):
    chosen = []
    while len(chosen) < min(k, len(relevance)):
        gains = {}
        for row in range(len(relevance)):
            if row not in chosen:
                near = max((cosine(vectors[row], vectors[one]) for one in chosen), default=0.0)
                gains[row] = (1 - diversity) * relevance[row] - diversity * near
        chosen.append(max(gains, key=lambda row: (gains[row], -row)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("above", [0.2, 0.7, 1.0])
def test_folding_is_the_plain_rule(above, seed):
    vectors, known = units(40, seed=seed), units(2, seed=100 + seed)
    assert tuple(fold(vectors, above, known)) == plain_fold(vectors, above, known)
    assert fold(vectors, above, known[:0]).of_known == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("diversity", [0.0, 0.3, 1.0])
def test_diversity_is_maximal_marginal_relevance(diversity, seed):
    vectors = units(30, seed=seed)
    relevance = np.sort(np.random.default_rng(seed).random(30))[::-1]
    assert diverse(relevance, vectors, 12, diversity) == plain_mmr(relevance, vectors, 12, diversity)
    assert diverse(relevance, vectors, 99, 0.0) == list(range(30))


def test_nothing_to_arrange():
    empty = units(3)[:0]
    assert arrange([], empty, 5, 0.5, 0.9, empty) == ([], {}, [])


def notes_in_groups(copies=6, groups=4):
    """An index of groups of near duplicates (cosine above .99) that lie at growing distances from the note "q"."""
    angles = [0.3 * (1 + group) + 0.001 * copy for group in range(groups) for copy in range(copies)]
    ids = [f"{group}.{copy}" for group in range(groups) for copy in range(copies)]
    points = np.array([[math.cos(a), math.sin(a)] for a in [0.0, 0.001, *angles]], np.float32)
    return LiveIndex(NoteBatch(["q", "repost", *ids], points), IndexSettings(kind="exact"), model_fingerprint="m")


@pytest.fixture
def gateway():
    made = Gateway.__new__(Gateway)
    made.limits, made.settings, made.figures = LimitSettings(), ServeSettings(), Figures("test")
    made._search_seconds, made.ranker = 0.0, None
    index = notes_in_groups()
    table = SimpleNamespace(columns=("embedding",))
    made.follower = SimpleNamespace(state=SimpleNamespace(index=index, table=table, seq=0), index=index)

    async def popular(method, *arguments, seconds):
        return []

    made.users = SimpleNamespace(call=popular)
    return made


def similar(gateway, **body):
    return json.loads(asyncio.run(find_similar(gateway, SimilarRequest(note_id="q", **body))))


def test_similar_notes_are_folded_into_the_best_of_each_kind(gateway):
    answer = similar(gateway, k=4, fold_above=0.99)
    assert [one["note_id"] for one in answer["results"]] == ["0.0", "1.0", "2.0", "3.0"]
    assert answer["duplicates"] == ["repost"]
    others = [[f"{group}.{copy}" for copy in range(1, 6)] for group in range(4)]
    assert [one["duplicates"] for one in answer["results"]] == others
    plain = similar(gateway, k=3)
    assert [one["note_id"] for one in plain["results"]] == ["repost", "0.0", "0.1"] and "duplicates" not in plain


def test_diverse_similar_notes_come_from_more_kinds(gateway):
    ids = [one["note_id"] for one in similar(gateway, k=8, diversity=0.8)["results"]]
    assert ids[0] == "repost" and ids[1].startswith("3.")
    assert [one["note_id"] for one in similar(gateway, k=2, diversity=0)["results"]] == ["repost", "0.0"]


def recommended(gateway, **body):
    answer = asyncio.run(Recommendation(gateway, RecommendRequest(history=["q"], **body)).make())
    return {one["note_id"]: one["duplicates"] for one in answer["results"]}


def test_recommendations_repeat_neither_themselves_nor_the_history(gateway):
    assert list(recommended(gateway, k=3)) == ["repost", "0.0", "0.1"]
    folded = recommended(gateway, k=3, fold_above=0.99)
    assert list(folded) == ["0.0", "1.0", "2.0"] and folded["1.0"] == [f"1.{copy}" for copy in range(1, 6)]
    diverse_ids = list(recommended(gateway, k=3, diversity=0.9))
    assert diverse_ids[0] == "repost" and diverse_ids[1].startswith("3.")
