"""Merging neighbours, ranking, arms of experiments."""

from __future__ import annotations

import numpy as np
import pytest

from notellm2_ray.core.settings.serve import ArmSettings, RecommendSettings
from notellm2_ray.serve.experiments import arm_of
from notellm2_ray.serve.recommend import merge, ranked, recent, weights

SETTINGS = RecommendSettings(recency_decay=0.5, score_power=2.0, history_notes=2)


def test_recent_notes_appear_once_at_their_last_place():
    assert recent(["a", "b", "a", "c"], SETTINGS) == ["a", "c"]
    assert recent([], SETTINGS) == []
    np.testing.assert_allclose(weights(3, 0.5), [0.25, 0.5, 1.0])


def test_merging_adds_weighted_powers_and_names_the_strongest_source_first():
    found = {"a": (["x", "y", "seen"], np.array([0.8, 0.6, 0.9])), "c": (["y", "z"], np.array([0.5, -0.3]))}
    candidates = merge(["a", "c"], found, frozenset(["seen"]), SETTINGS)
    assert [one.note_id for one in candidates] == ["y", "x", "z"]
    assert candidates[0].score == pytest.approx(0.5 * 0.36 + 0.25)
    assert candidates[0].from_history == ("c", "a")
    assert candidates[1].score == pytest.approx(0.5 * 0.64) and candidates[2].score == 0.0


def test_ranking_puts_scored_notes_first_and_keeps_recalls_order_for_the_rest():
    candidates = merge(["a"], {"a": (["p", "q", "r", "s"], np.array([0.9, 0.8, 0.7, 0.6]))}, frozenset(), SETTINGS)
    order = ranked(candidates, [0.1, None, 0.7])
    assert [(one.note_id, p) for one, p in order] == [("r", 0.7), ("p", 0.1), ("q", None), ("s", None)]
    assert [one.note_id for one, _ in ranked(candidates, [])] == ["p", "q", "r", "s"]


def test_arms_are_stable_follow_their_shares_and_change_with_the_name():
    arms = (ArmSettings(name="a", share=0.25), ArmSettings(name="b", share=0.75, use_ranker=False, score_power=1.0))
    users = [f"u{row}" for row in range(4000)]
    names = [arm_of(user, "first", arms, SETTINGS).name for user in users]
    assert names == [arm_of(user, "first", arms, SETTINGS).name for user in users]
    assert names.count("a") / 4000 == pytest.approx(0.25, abs=0.03)
    other = [arm_of(user, "second", arms, SETTINGS).name for user in users]
    both = sum(one == two == "a" for one, two in zip(names, other, strict=True)) / 4000
    assert both == pytest.approx(0.0625, abs=0.02)
    changed = next(arm_of(user, "first", arms, SETTINGS) for user in users if names[users.index(user)] == "b")
    assert changed.recommend.use_ranker is False and changed.recommend.score_power == 1.0
    assert changed.recommend.recency_decay == 0.5
    assert arm_of("u", "first", (), SETTINGS).name == "default"
