"""The two ways of cutting histories into blocks, one user at a time and many at once, give the same blocks."""

from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from notellm2_ray.core.history_blocks import MINUTE, BlockRule, LikedNote, cut_history, number_blocks
from notellm2_ray.core.settings import SequenceSettings

GAPS = [None, 1, MINUTE, int(0.5 * MINUTE) + 1]


@st.composite
def histories(draw) -> list[list[LikedNote]]:
    """Users with short histories in time's order: equal times, pauses of exactly a gap, session ids missing or not."""
    names = draw(st.sampled_from([[None], ["s1", "s2", "会话"], [None, "s1", "s2"]]))
    steps = st.sampled_from([0, 1, 2, MINUTE // 2, MINUTE // 2 + 1, MINUTE // 2 + 2, MINUTE, MINUTE + 1])
    users = []
    for events in draw(st.lists(st.lists(st.tuples(steps, st.sampled_from(names)), min_size=1, max_size=12))):
        time, notes = draw(st.integers(-MINUTE, MINUTE)), []
        for step, session in events:
            time += step
            notes.append(LikedNote(f"n{len(notes)}", time, session))
        users.append(notes)
    return users


def cut_at_once(users: list[list[LikedNote]], rule: BlockRule) -> list[list[list[LikedNote]]]:
    notes = [note for user in users for note in user]
    offsets = np.cumsum([0, *map(len, users)])
    times = np.array([note.time for note in notes], np.int64)
    numbers = number_blocks(offsets, times, pa.array([note.session_id for note in notes], pa.string()), rule)
    cut = []
    for start, end in pairwise(offsets):
        rows = groupby(range(start, end), lambda row: numbers[row])
        found = [(number, [notes[row] for row in group]) for number, group in rows]
        assert [number for number, _ in found] == list(range(len(found)))
        cut.append([block for _, block in found])
    return cut


@given(histories(), st.integers(1, 4), st.sampled_from(GAPS))
@example([], 3, MINUTE)
@example([[LikedNote("a", 0, None)], [LikedNote("b", 5 * MINUTE, None), LikedNote("c", 5 * MINUTE, "s1")]], 1, MINUTE)
def test_one_user_at_a_time_equals_many_at_once(users, size, gap):
    rule = BlockRule(size, gap)
    assert cut_at_once(users, rule) == [list(cut_history(user, rule)) for user in users]


@given(histories(), st.integers(1, 4), st.sampled_from(GAPS))
def test_later_notes_extend_the_last_block_and_change_no_other(users, size, gap):
    rule = BlockRule(size, gap)
    for user in users:
        whole = list(cut_history(user, rule))
        for count in range(1, len(user)):
            *closed, last = cut_history(user[:count], rule)
            assert closed == whole[: len(closed)]
            assert whole[len(closed)][: len(last)] == last


@pytest.mark.parametrize("minutes", [60.0, 0.5, 1e-8, 1.00000001])
def test_a_gap_between_two_microseconds_counts_as_the_settings_say(minutes):
    rule = BlockRule.from_settings(SequenceSettings(blocks_by="session", session_gap_minutes=minutes, block_size=9))
    for pause in (rule.session_gap, rule.session_gap + 1):
        assert rule.is_pause(0, pause) == (pause > minutes * MINUTE)
    assert BlockRule.from_settings(SequenceSettings(session_gap_minutes=minutes)).session_gap is None
