"""Users: tastes that drift, a feed that follows them, and the log of views and clicks.

At any moment a user wants :data:`SLOTS` subjects and as many styles; every week each may be replaced by another. Most
of what the feed shows matches a wanted subject and a wanted style, some of it matches one of them, and some is random.
The click rate depends on the product of the two matches. No user sees a note before it exists, or twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from notellm2_ray.data.world.draws import choices, uniforms
from notellm2_ray.data.world.factors import DAY, Traits, traits
from notellm2_ray.data.world.settings import WorldSettings

SLOTS = 2  # subjects, and styles, that a user wants at one time: a main one and a second
MAIN = 0.7  # probability that the feed follows the main one
DRIFT = 0.25  # probability that a wanted subject, or style, is replaced at the end of a week
VISIT = 8  # impressions in a visit
FEED = (0.85, 0.88, 0.91)  # cumulative shares: matches both factors, the subject, the style; the rest is random
# If the user has seen the note that the feed found, the feed tries again, with (1) or without (0) changing to the
# user's other subject and other style. If every attempt fails, the impression is left out.
ATTEMPTS = ((0, 0), (0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (0, 1))
MEAN_AGE_DAYS = 1.5  # the feed looks for notes of about this age
CANDIDATES = 2  # the feed shows the most appealing of these: popularity is skewed
CLICK_RATE = 0.6  # of a note that matches both wanted factors
MISMATCH = 0.05  # a factor that does not match leaves this part of that rate
CHANCE_CLICK = 0.02  # added in any case
APPEAL = 0.15  # how far a note's appeal raises (or lowers) its click rate, per standard deviation
MAX_IMPRESSIONS = 1 << 20  # positions per user in the random streams


class Impressions(NamedTuple):
    """M impressions of some users, by user and time."""

    user: np.ndarray  # (M,) int64
    place: np.ndarray  # (M,) int64, the impression's number in the world, which is its position in the random streams
    visit: np.ndarray  # (M,) int64, counted per user
    seconds: np.ndarray  # (M,) float64 since the log's start
    note: np.ndarray  # (M,) int64
    clicked_after: np.ndarray  # (M,) float64 seconds until the click, NaN without one


class Catalogue:
    """All notes that are not broken, by what they match and when they appeared: about 100 bytes a note.

    Groups are every pair of subject and style, then every subject, every style, and all notes.
    """

    def __init__(self, settings: WorldSettings, seed: int) -> None:
        self.traits: Traits = traits(settings, seed, np.arange(settings.num_notes))
        self.num_subjects, self.num_styles = settings.num_subjects, settings.num_styles
        self.pairs = self.num_subjects * self.num_styles
        self.everything = self.pairs + self.num_subjects + self.num_styles
        self._span = (settings.days * 2 + 1) * DAY  # longer than the time between any two moments
        subject, style, created = self.traits.subject, self.traits.style, self.traits.created
        everything = np.full(len(created), self.everything)
        groups = (self.pair(subject, style), self.by_subject(subject), self.by_style(style), everything)
        alive = np.flatnonzero(self.traits.healthy)
        keys = np.concatenate([self._key(group[alive], created[alive]) for group in groups])
        order = np.argsort(keys, kind="stable")
        self._keys, self._notes = keys[order], np.tile(alive, 4)[order]

    def pair(self, subject: np.ndarray, style: np.ndarray) -> np.ndarray:
        """Group of the notes with this subject in this style."""
        return subject * self.num_styles + style

    def by_subject(self, subject: np.ndarray) -> np.ndarray:
        return self.pairs + subject

    def by_style(self, style: np.ndarray) -> np.ndarray:
        return self.pairs + self.num_subjects + style

    def _key(self, group: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        return (group + 0.5) * self._span + seconds

    def pick(self, group: np.ndarray, seconds: np.ndarray, age: np.ndarray, fallback: np.ndarray) -> np.ndarray:
        """A note of each group that existed at ``seconds``: the newest of at least age ``age``, or else any.

        Args:
            group, seconds, age, fallback: of equal shape; fallback, in [0, 1), picks the note if none is old enough.

        Returns:
            note numbers, -1 where the group was empty.
        """
        first = np.searchsorted(self._keys, self._key(group, np.full(group.shape, -0.5 * self._span)))
        end = np.searchsorted(self._keys, self._key(group, seconds), side="right")
        aged = np.searchsorted(self._keys, self._key(group, np.maximum(seconds - age, -0.5 * self._span)), side="right")
        position = np.where(aged > first, aged - 1, first + (fallback * (end - first)).astype(np.int64))
        return np.where(end > first, self._notes[np.minimum(position, len(self._notes) - 1)], -1)


@lru_cache(maxsize=2)
def catalogue(settings: WorldSettings, seed: int) -> Catalogue:
    """The world's catalogue, made once per process."""
    return Catalogue(settings, seed)


def tastes(settings: WorldSettings, seed: int, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wanted subjects and wanted styles of ``users`` (U,) in each of their own weeks, each (U, weeks, SLOTS) int64.

    The weeks of different users begin on different days: see :func:`week_of`.
    """
    weeks = settings.days // 7 + 2
    place = (users[:, None, None] * weeks + np.arange(weeks)[:, None]) * SLOTS + np.arange(SLOTS)
    wanted = []
    for factor, num in (("subject", settings.num_subjects), ("style", settings.num_styles)):
        taste = choices(seed, f"taste {factor}", place, num)
        kept = uniforms(seed, f"drift {factor}", place) >= DRIFT
        for week in range(1, weeks):
            taste[:, week] = np.where(kept[:, week], taste[:, week - 1], taste[:, week])
        wanted.append(taste)
    return wanted[0], wanted[1]


def week_of(seed: int, users: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Number of the user's own week at each moment."""
    return ((seconds / DAY + 7 * uniforms(seed, "week phase", users)) // 7).astype(np.int64)


def impressions(settings: WorldSettings, seed: int, users: np.ndarray) -> Impressions:
    """Everything shown to ``users`` (U,), which must be distinct; no note is shown to a user twice.

    A user who has seen every note that the feed can find sees fewer than planned.
    """
    row, number, visit, seconds = _visits(settings, seed, users)
    user = users[row]
    place = user * MAX_IMPRESSIONS + number
    subjects, styles = tastes(settings, seed, users)
    week = week_of(seed, user, seconds)
    wanted = (subjects[row, week], styles[row, week])
    note = _feed(catalogue(settings, seed), seed, user, place, seconds, wanted)
    shown = note >= 0
    rate = _click_rate(catalogue(settings, seed), note, wanted)
    clicked = uniforms(seed, "click", place) < rate
    delay = np.where(clicked, 2 + np.floor(uniforms(seed, "click delay", place) * 13), np.nan)
    return Impressions(*(column[shown] for column in (user, place, visit, seconds, note, delay)))


def _visits(settings: WorldSettings, seed: int, users: np.ndarray) -> tuple[np.ndarray, ...]:
    # Activity is skewed: half of the mean for everyone, the rest exponential, cut at four times the mean.
    activity = np.minimum(0.5 - 0.5 * np.log1p(-uniforms(seed, "activity", users)), 4.0)
    count = np.clip(np.rint(activity * settings.events_per_user), 2, MAX_IMPRESSIONS).astype(np.int64)
    row = np.repeat(np.arange(len(users)), count)
    user = users[row]
    number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    visit = number // VISIT
    start = (visit + uniforms(seed, "visit", user * MAX_IMPRESSIONS + visit)) / -(-count // VISIT)[row]
    within = (number % VISIT) * 45 + uniforms(seed, "pause", user * MAX_IMPRESSIONS + number) * 25
    return row, number, visit, np.floor(start * (settings.days * DAY - VISIT * 45 - 60) + within)


def _feed(
    notes: Catalogue,
    seed: int,
    user: np.ndarray,
    place: np.ndarray,
    seconds: np.ndarray,
    wanted: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    rows = np.arange(len(place))
    slots = [(uniforms(seed, f"slot {factor}", place) >= MAIN).astype(np.int64) for factor in ("subject", "style")]
    mode = np.searchsorted(FEED, uniforms(seed, "mode", place), side="right")
    everything = np.full(len(place), notes.everything)
    attempts = []
    for change in ATTEMPTS:
        subject, style = (
            taste[rows, (slot + moved) % SLOTS] for taste, slot, moved in zip(wanted, slots, change, strict=True)
        )
        groups = [notes.pair(subject, style), notes.by_subject(subject), notes.by_style(style), everything]
        attempts.append(np.choose(mode, groups))
    note = np.full(len(place), -1)
    for number, group in enumerate(attempts):
        again = np.flatnonzero((note < 0) | _seen_before(user, note))
        note[again] = _candidate(notes, seed, f"feed {number}", place[again], seconds[again], group[again])
    note[_seen_before(user, note)] = -1
    return note


def _candidate(
    notes: Catalogue, seed: int, name: str, place: np.ndarray, seconds: np.ndarray, group: np.ndarray
) -> np.ndarray:
    spot = place[:, None] * CANDIDATES + np.arange(CANDIDATES)
    age = -np.log1p(-uniforms(seed, f"{name} age", spot)) * MEAN_AGE_DAYS * DAY
    shape = spot.shape
    found = notes.pick(
        np.broadcast_to(group[:, None], shape),
        np.broadcast_to(seconds[:, None], shape),
        age,
        uniforms(seed, f"{name} any", spot),
    )
    best = np.argmax(notes.traits.appeal[found], axis=1)
    return found[np.arange(len(place)), best]


def _seen_before(user: np.ndarray, note: np.ndarray) -> np.ndarray:
    # A stable sort keeps equal (user, note) in order of time: all but the first were seen before.
    order = np.lexsort((note, user))
    repeated = np.zeros(len(note), dtype=bool)
    repeated[order[1:]] = (user[order[1:]] == user[order[:-1]]) & (note[order[1:]] == note[order[:-1]])
    return repeated & (note >= 0)


def _click_rate(notes: Catalogue, note: np.ndarray, wanted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    subject = np.where((wanted[0] == notes.traits.subject[note][:, None]).any(axis=1), 1.0, MISMATCH)
    style = np.where((wanted[1] == notes.traits.style[note][:, None]).any(axis=1), 1.0, MISMATCH)
    rate = (CHANCE_CLICK + CLICK_RATE * subject * style) * np.exp(APPEAL * notes.traits.appeal[note])
    return np.minimum(0.95, rate)
