"""How a user's history is cut into blocks: one rule, applied in two ways.

Offline the histories of many users are cut at once (:func:`number_blocks`); online one user's waiting notes are cut
whenever something was added (:func:`cut_history`). A property test checks that both give the same blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from notellm2_ray.core.settings import SequenceSettings

MINUTE = 60_000_000  # microseconds


class LikedNote(NamedTuple):
    """A note of a user's history, at the user's first positive event on it."""

    note_id: str
    time: int  # microseconds since 1970
    session_id: str | None


class BlockRule(NamedTuple):
    """Where blocks end.

    A block holds at most ``size`` notes. By session, it also ends where the session does: where the session id changes
    or, between two notes of which one has no session id, after a pause longer than ``session_gap``. Which block a note
    is in does not depend on later notes.
    """

    size: int = 3
    session_gap: int | None = None  # microseconds; None: blocks end only by size

    @classmethod
    def from_settings(cls, settings: SequenceSettings) -> BlockRule:
        """The rule of ``sequences.blocks_by``, ``block_size`` and ``session_gap_minutes``."""
        if settings.blocks_by == "size":
            return cls(settings.block_size)
        return cls(settings.block_size, int(settings.session_gap_minutes * MINUTE))

    def is_pause(self, start: int, end: int) -> bool:
        """Whether a pause between these times ends a session, where session ids are missing."""
        return self.session_gap is not None and end - start > self.session_gap

    def ends_session(self, last: LikedNote, following: LikedNote) -> bool:
        """Whether a session ends between two neighbours."""
        if self.session_gap is None:
            return False
        if last.session_id is not None and following.session_id is not None:
            return last.session_id != following.session_id
        return self.is_pause(last.time, following.time)


DEFAULT_RULE = BlockRule()


def cut_history(notes: Sequence[LikedNote], rule: BlockRule) -> Iterator[list[LikedNote]]:
    """The blocks of one user, one by one.

    Args:
        notes: the user's, in order.
    """
    if not notes:
        return
    block = [notes[0]]
    for last, following in itertools.pairwise(notes):
        if len(block) == rule.size or rule.ends_session(last, following):
            yield block
            block = []
        block.append(following)
    yield block


def number_blocks(offsets: np.ndarray, times: np.ndarray, sessions: pa.Array, rule: BlockRule) -> np.ndarray:
    """(E,) int64, the block of each note, 0, 1, ... within its user: :func:`cut_history` for many users at once.

    Args:
        offsets: (U + 1,), user u's notes are ``offsets[u]:offsets[u + 1]``.
        times: (E,) int64 microseconds.
        sessions: (E,) session ids, null where there is none.
    """
    lengths = np.diff(offsets)
    positions = np.arange(len(times)) - np.repeat(offsets[:-1], lengths)
    if rule.session_gap is None:
        return positions // rule.size
    starts = positions == 0
    pause = np.diff(times, prepend=0) > rule.session_gap
    ids = sessions.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    before = np.concatenate([[-1], ids])[: len(ids)]
    named = (ids >= 0) & (before >= 0)
    starts |= np.where(named, ids != before, pause)
    session = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # where each note's session starts
    starts |= (np.arange(len(starts)) - session) % rule.size == 0
    numbers = np.cumsum(starts)
    return numbers - np.repeat(numbers[offsets[:-1]], lengths)
