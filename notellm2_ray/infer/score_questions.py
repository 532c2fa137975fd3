"""What the model is shown of a candidate: its own image and its user's preference, or in a control those of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from notellm2_ray.core.candidate_rows import CandidateRow, CandidateRows
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.ranking import RankerSettings
from notellm2_ray.models.ranker.inputs import Question


class ScoreFiles(NamedTuple):
    """What a scoring job reads."""

    examples: Path
    candidates: Path
    preferences: Path | None
    store: Path  # a NoteStore of all notes that are shown

    def rows(self) -> CandidateRows:
        """The candidates.

        Raises:
            DataError: a table is missing or damaged.
        """
        return CandidateRows(self.examples, self.candidates, self.preferences)


class Controls(NamedTuple):
    """What is exchanged to see whether it matters. A choice depends on the seed and the candidate's place, no name."""

    shuffled_image: bool = False  # a candidate with an image is shown with the image of another random candidate
    other_preference: bool = False  # a user with a preference is given the preference of another random user
    seed: int = 0


class Questions:
    """Turns candidates into questions."""

    def __init__(self, files: ScoreFiles, ranker: RankerSettings, controls: Controls) -> None:
        """Read the tables, but no texts and images yet.

        Raises:
            DataError: there is nothing to exchange for a control.
        """
        self.rows, self._store = files.rows(), NoteStore(files.store, "score-candidates")
        self._ranker, self._controls = ranker, controls
        if controls.shuffled_image:
            with_image = set(self._store.ids_with_image)
            self._with_image = [note for note in dict.fromkeys(self.rows.note_ids) if note in with_image]
            if len(self._with_image) < 2:
                raise DataError("shuffled_image: fewer than two candidates have an image to exchange")
        if controls.other_preference:
            self._users = self.rows.user_ids
            self._with_preference = self.rows.examples_with_preference
            if len({self._users[example] for example in self._with_preference}) < 2:
                raise DataError("other_preference: fewer than two users have a preference to exchange")

    def __call__(self, places: Sequence[int]) -> list[tuple[CandidateRow, Question | str]]:
        """The candidates at some places, each with its question or with the reason why it has none."""
        return [self._one(place, row) for place, row in zip(places, self.rows.rows(places), strict=True)]

    def _one(self, place: int, row: CandidateRow) -> tuple[CandidateRow, Question | str]:
        if row.note_id not in self._store:
            return row, f"there is no note {row.note_id!r}"
        (note,) = self._store.get([row.note_id])
        image, preference = note.image, row.preference
        if self._controls.shuffled_image and image is not None:
            (other,) = self._store.get([self._other_note(place, row)])
            image = other.image
        if self._controls.other_preference and preference is not None:
            preference = self.rows.preference(self._other_example(place))
        titles: tuple[str, ...] = ()
        if self._ranker.variant == "tallrec":
            shown = [one for one in row.history_ids[-self._ranker.max_history :] if one in self._store]
            titles = tuple(one.title for one in self._store.get(shown))
        return row, Question(note.title, image, preference, titles)

    def _other_note(self, place: int, row: CandidateRow) -> str:
        pick = _draw(self._controls.seed, "shuffled_image", len(self._with_image), place)
        if self._with_image[pick] == row.note_id:
            pick = (pick + 1) % len(self._with_image)
        return self._with_image[pick]

    def _other_example(self, place: int) -> int:
        """An example of another user; the same one for all candidates of an example."""
        example = int(self.rows.example_of[place])
        user = self._users[example]
        pick = _draw(self._controls.seed, "other_preference", len(self._with_preference), example)
        while self._users[self._with_preference[pick]] == user:
            pick = (pick + 1) % len(self._with_preference)
        return int(self._with_preference[pick])


def _draw(seed: int, control: str, below: int, place: int) -> int:
    return int(np.random.default_rng(stream_seed(seed, "score", control, place)).integers(below))
