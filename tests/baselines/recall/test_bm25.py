"""BM25 finds notes by their words, and ties count against it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.baselines.recall.bm25 import Bm25
from notellm2_ray.core.errors import DataError


def test_the_obvious_note_is_found_in_both_languages():
    pool = ["football match tonight", "chocolate cake recipes", "今天的足球比赛", "巧克力蛋糕的做法", ""]
    bm25 = Bm25(pool)
    ranks = bm25.ranks(["a recipe for cakes", "怎么做蛋糕"], np.array([-1, -1]), np.array([1, 3]))
    assert ranks.tolist() == [1, 1]


WORDS = st.lists(st.sampled_from(["cat", "dog", "蛋糕", "fish"]), max_size=4).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WORDS, min_size=2, max_size=8), data=st.data())
def test_ranks_equal_a_full_sort_with_ties_last(texts, data):
    texts = [*texts, "cat"]
    target = data.draw(st.integers(0, len(texts) - 1))
    query = data.draw(st.integers(-1, len(texts) - 1).filter(lambda row: row != target))
    text = texts[query] if query >= 0 else data.draw(WORDS)
    bm25 = Bm25(texts)
    scores = bm25.scores(text)
    others = [row for row in range(len(texts)) if row != query]
    expected = sorted(others, key=lambda row: (-scores[row], row == target)).index(target) + 1
    assert bm25.ranks([text], np.array([query]), np.array([target])).tolist() == [expected]


def test_a_query_without_known_words_has_the_worst_rank():
    bm25 = Bm25(["cat", "dog", "fish"])
    assert bm25.ranks(["zebra", ""], np.array([0, -1]), np.array([1, 1])).tolist() == [2, 3]


def test_a_pool_without_words_is_refused():
    with pytest.raises(DataError, match="no word in the texts of 2 notes"):
        Bm25(["", "!!"])
    with pytest.raises(DataError, match="0 notes"):
        Bm25([])
