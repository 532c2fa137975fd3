"""Negatives equal those of a plain version, and follow the distribution of the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.data.sequences.negatives import Liked, Pool, num_eligible, sample, shuffle_keys

WORD = 2**64


def mix(number: int) -> int:
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB % WORD
    return number ^ number >> 31


def unit(number: int) -> float:
    return (number >> 11) * 2.0**-53


def twin(births, weights, own: set[int], key: int, time: int, count: int, max_age: int | None) -> list[int]:
    """One draw after another; after 8 * count + 64 draws, the rest by the smallest exponential keys."""
    order = sorted(range(len(births)), key=lambda note: (births[note], note))
    early = [note for note in order if max_age is not None and births[note] < time - max_age]
    born = [note for note in order if births[note] <= time and note not in early]
    found: list[int] = []
    for draw in range(1, 8 * count + 65):
        value = int(unit(mix((key + draw * 0x9E3779B97F4A7C15) % WORD)) * sum(weights[note] for note in born))
        place = 0
        while value >= weights[born[place]]:
            value -= weights[born[place]]
            place += 1
        if born[place] not in own and born[place] not in found and len(found) < count:
            found.append(born[place])
    places = enumerate(born, start=len(early))
    left = [(place, note) for place, note in places if note not in own and note not in found]
    waits = [
        (-np.log1p(-unit(mix(mix((key + place * 0x9E3779B97F4A7C15) % WORD)))) / weights[note], note)
        for place, note in left
    ]
    return (found + [note for _, note in sorted(waits)])[:count]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(3, 30),
    st.integers(1, 4),
    st.sampled_from([1, 3, 10_000]),
    st.none() | st.integers(0, 4),
)
def test_equals_the_plain_twin(seed, num_notes, count, skew, max_age):
    rng = np.random.default_rng(seed)
    births, weights = rng.integers(0, 5, num_notes), rng.integers(1, 1 + skew, num_notes)
    owners, notes = rng.integers(0, 4, 2 * num_notes), rng.integers(0, num_notes, 2 * num_notes)
    pool = Pool.build(births, weights, np.ones(num_notes, bool))
    liked = Liked.build(owners, notes, pool)
    users, times = rng.integers(0, 4, 12), rng.integers(0, 6, 12)
    keys = rng.integers(0, 2**64, 12, dtype=np.uint64)
    own = [set(notes[owners == user].tolist()) for user in range(4)]
    oldest = [-1 if max_age is None else time - max_age for time in times]
    born = [
        {note for note in range(num_notes) if begin <= births[note] <= time}
        for begin, time in zip(oldest, times, strict=True)
    ]
    eligible = num_eligible(pool, liked, users, times, max_age)
    assert eligible.tolist() == [len(b - own[user]) for b, user in zip(born, users, strict=True)]
    fine = eligible >= count
    users, times, keys = users[fine], times[fine], keys[fine]
    drawn = sample(pool, liked, keys, users, times, count, max_age)
    expected = [
        twin(births, weights, own[user], int(key), time, count, max_age)
        for user, key, time in zip(users, keys, times, strict=True)
    ]
    assert drawn.tolist() == expected


@pytest.mark.parametrize(("own", "expected"), [([], [0.1, 0.3, 0.6]), ([1], [1 / 7, 0, 6 / 7])])
def test_the_first_draw_follows_the_weights_without_the_users_notes(own, expected):
    pool = Pool.build(np.zeros(3, np.int64), np.array([1, 3, 6]), np.ones(3, bool))
    liked = Liked.build(np.zeros(len(own), np.int64), np.array(own, np.int64), pool)
    keys = np.random.default_rng(1).integers(0, 2**64, 20_000, dtype=np.uint64)
    zeros = np.zeros(len(keys), np.int64)
    counts = np.bincount(sample(pool, liked, keys, zeros, zeros, 1).ravel(), minlength=3)
    assert counts / len(keys) == pytest.approx(expected, abs=0.015)


def test_uniform_negatives_are_uniform_and_their_order_tells_nothing():
    pool = Pool.build(np.zeros(50, np.int64), np.ones(50, np.int64), np.arange(50) != 7)
    liked = Liked.build(np.zeros(1, np.int64), np.zeros(1, np.int64), pool)
    keys = np.random.default_rng(2).integers(0, 2**64, 5000, dtype=np.uint64)
    zeros = np.zeros(len(keys), np.int64)
    drawn = sample(pool, liked, keys, zeros, zeros, 20)
    counts = np.bincount(drawn.ravel(), minlength=50)
    assert counts[[0, 7]].tolist() == [0, 0]
    assert np.delete(counts, [0, 7]) == pytest.approx(5000 * 20 / 48, rel=0.1)
    first = np.argsort(shuffle_keys(keys, 21), axis=1)[:, 0]
    assert np.bincount(first, minlength=21) == pytest.approx(5000 / 21, rel=0.25)


def test_few_notes_are_all_drawn():
    pool = Pool.build(np.zeros(40, np.int64), np.append(10**9, np.ones(39, np.int64)), np.ones(40, bool))
    liked = Liked.build(np.zeros(3, np.int64), np.arange(3), pool)  # the heavy note is the user's: all draws hit it
    drawn = sample(pool, liked, np.array([5], np.uint64), np.zeros(1, np.int64), np.zeros(1, np.int64), 37)
    assert sorted(drawn[0].tolist()) == list(range(3, 40))
