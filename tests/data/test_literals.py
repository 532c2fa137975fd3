"""Lists that went through text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.data.literals import split_topics

TOPIC = st.text(min_size=1, max_size=12)


@given(st.lists(TOPIC, min_size=1, max_size=6))
def test_a_written_list_comes_back(topics):
    assert split_topics(json.dumps(topics), None) == topics
    assert split_topics(repr(topics), None) == topics
    assert split_topics(repr(tuple(topics)), None) == topics


@given(st.lists(st.text("abc 'é猫", min_size=1, max_size=30), min_size=2, max_size=6))
def test_numpy_s_way_of_showing_a_list(topics):
    assert split_topics(str(np.array(topics, dtype=object)), None) == topics


@pytest.mark.parametrize(
    ("text", "topics"),
    [
        ("food|tea, green", ["food", "tea, green"]),
        ("food, tea", ["food", " tea"]),
        ("旅行、美食", ["旅行", "美食"]),
        ("food; tea", ["food", " tea"]),
        ("[food, tea]", ["food", "tea"]),  # as Spark casts a list
        ('{food,"green tea"}', ["food", "green tea"]),  # as PostgreSQL writes an array
        ("{'b', 'a'}", ["b", "a"]),
        ("[]", []),
        ("[OC]", ["[OC]"]),
        ("#food #tea", ["", "food ", "tea"]),
        ("C#", ["C#"]),
        ("one topic", ["one topic"]),
        ("[__import__('os').getcwd()]", ["[__import__('os').getcwd()]"]),  # never evaluated
        ("[" * 9999 + "]" * 9999, ["[" * 9999 + "]" * 9999]),  # too deep to be parsed
    ],
)
def test_topics_in_one_string(text, topics):
    assert split_topics(text, None) == topics


def test_a_chosen_separator_is_the_only_one():
    assert split_topics("a, b/c", "/") == ["a, b", "c"]
    assert split_topics("a, b/c", "") == ["a, b/c"]
    assert split_topics("['a', 'b']", "/") == ["a", "b"]
