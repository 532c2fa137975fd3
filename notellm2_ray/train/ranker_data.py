"""Questions of a tuning run: read, joined with their notes, tokenised, and put into groups of similar length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.candidate_rows import CandidateRow, CandidateRows, store_notes
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import QUARANTINE_SCHEMA
from notellm2_ray.core.settings.ranking import RankerSettings, TuneSettings
from notellm2_ray.models.ranker.inputs import Question, RankerFeatures, RankerPreprocessor
from notellm2_ray.train.readers import Readers

# Among many noisy figures the highest is so by chance: a long run has better validations rather than more.
_VALIDATE_EVERY, _VALIDATIONS = 100, 20
# Work of tuning on a prompt in units of scoring it. Weights that are frozen have no gradients to compute.
_TUNING_WORK = 2


class RankerFiles(NamedTuple):
    """What a tuning run reads."""

    sequences: Path  # {train,valid}.parquet and candidates/{train,valid}.parquet
    preferences: Path | None
    store: Path  # a NoteStore of all notes that are shown

    def candidates(self, split: str) -> CandidateRows:
        """The candidates of ``train`` or ``valid``.

        Raises:
            DataError: a table is missing or damaged.
        """
        return CandidateRows(
            self.sequences / f"{split}.parquet", self.sequences / "candidates" / f"{split}.parquet", self.preferences
        )


class RankerRows:
    """The candidates of a split whose notes exist.

    Attributes:
        missing: (example_id, note_id) of the candidates whose note is not in the store.
    """

    def __init__(self, files: RankerFiles, split: str, ranker: RankerSettings) -> None:
        self.candidates = files.candidates(split)
        self._store, self._ranker = NoteStore(files.store, "train-ranker"), ranker
        there = np.array([note_id in self._store for note_id in self.candidates.note_ids], bool)
        self._places = np.flatnonzero(there)
        self.missing = [row[:2] for row in self.candidates.rows(np.flatnonzero(~there))]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def labels(self) -> np.ndarray:
        """(R,) bool."""
        return self.candidates.labels[self._places].astype(bool)

    def of_examples(self, max_examples: int, seed: int, max_rows: int | None = None) -> np.ndarray:
        """Rows of the candidates of some random examples, in the order of the table.

        Args:
            max_rows: the most rows. Beyond it each example has fewer negatives, drawn at random but at least one, and
                then there are fewer examples: targets are the rarer kind, and the AUC's error depends on them.
        """
        examples = self.candidates.example_of[self._places]
        rng = np.random.default_rng(stream_seed(seed, "train", "validation"))
        chosen = rng.permutation(np.unique(examples))[:max_examples]
        rows = np.flatnonzero(np.isin(examples, chosen))
        if max_rows is None or len(rows) <= max_rows:
            return rows
        chosen = chosen[: max(1, max_rows // 2)]
        rows = rows[np.isin(examples[rows], chosen)]
        targets = self.labels[rows]
        negatives = rng.permutation(rows[~targets])
        negatives = negatives[np.argsort(examples[negatives], kind="stable")]
        owners = examples[negatives]
        place = np.arange(len(owners)) - np.searchsorted(owners, owners)  # among those of the same example
        kept = negatives[place < max(1, max_rows // len(chosen) - 1)]
        return np.sort(np.concatenate([rows[targets], kept]))

    def question(self, row: int) -> tuple[CandidateRow, Question]:
        """One candidate with its question."""
        (candidate,) = self.candidates.rows([self._places[row]])
        (note,) = self._store.get([candidate.note_id])
        titles: tuple[str, ...] = ()
        if self._ranker.variant == "tallrec":
            shown = [one for one in candidate.history_ids[-self._ranker.max_history :] if one in self._store]
            titles = tuple(one.title for one in self._store.get(shown))
        return candidate, Question(note.title, note.image, candidate.preference, titles)


class Asked(NamedTuple):
    """A question to make features of."""

    note_id: str
    question: Question
    answer: bool | None  # None: the prompt alone


class QuestionFeatures:
    """Turns a question into features."""

    def __init__(self, preprocessor: RankerPreprocessor) -> None:
        self._preprocessor = preprocessor

    def __call__(self, asked: Asked) -> RankerFeatures:
        try:
            return self._preprocessor.features(asked.question, asked.answer)
        except DataError as error:
            raise DataError(f"note {asked.note_id}: {error}") from error


class QuestionPreparer:
    """Turns rows into features. May be called from several threads at once."""

    def __init__(self, rows: RankerRows, readers: Readers[Asked, RankerFeatures]) -> None:
        self._rows, self._readers = rows, readers

    def __call__(self, rows: Sequence[int], *, answered: bool) -> list[RankerFeatures]:
        """Features of some rows, either with answers and labels or as prompts alone.

        Raises:
            DataError: an image cannot be decoded; the message names the note.
        """
        shown = [self._rows.question(int(row)) for row in rows]
        return self._readers([Asked(one.note_id, asked, bool(one.label) if answered else None) for one, asked in shown])


def length_groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places in groups of similar length, short ones first, each of at most ``max_tokens`` tokens with its padding.

    A row that is longer than that is a group of its own.
    """
    groups: list[list[int]] = []
    for place in np.argsort(lengths, kind="stable").tolist():
        if groups and (len(groups[-1]) + 1) * lengths[place] <= max_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def split_groups(groups: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The groups, of which the largest are halved until there are ``count``."""
    split = [list(group) for group in groups]
    while len(split) < count:
        largest = max(range(len(split)), key=lambda number: len(split[number]))
        group = split[largest]
        assert len(group) > 1, "a rank has fewer rows than groups are asked for"
        split[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return split


def gather_notes(files: RankerFiles, notes: Path, ranker: RankerSettings) -> None:
    """Write the store of all notes that a run shows, unless an earlier run has written it.

    Raises:
        DataError: a table is missing or damaged, or there are no notes.
    """
    if files.store.exists():
        return
    ids: set[str] = set()
    for split in ("train", "valid"):
        rows = files.candidates(split)
        ids |= set(rows.note_ids)
        if ranker.variant == "tallrec":
            ids |= rows.history_ids(ranker.max_history)
    files.store.parent.mkdir(parents=True, exist_ok=True)
    store_notes(notes, ids, files.store)


class ValidationPlan(NamedTuple):
    """When a tuning run validates, and on what."""

    every_steps: int
    rows: np.ndarray  # of the validation split


def validation_plan(tune: TuneSettings, total_steps: int, valid: RankerRows) -> ValidationPlan:
    """Validations that take at most ``tune.validation_share`` of the training's work (but for the one at the end)."""
    every = tune.validate_every_steps or max(_VALIDATE_EVERY, math.ceil(total_steps / _VALIDATIONS))
    affordable = int(tune.validation_share * _TUNING_WORK * every * tune.batch_size)
    return ValidationPlan(every, valid.of_examples(tune.max_validation_examples, tune.seed, max(2, affordable)))


def check_rows(files: RankerFiles, ranker: RankerSettings, tune: TuneSettings, output: Path) -> dict[str, Any]:
    """Check the examples before anything is started. Candidates without a note are quarantined.

    Returns:
        prompts, quarantined, without_preference.

    Raises:
        DataError: there are fewer prompts than fill a batch, or a table is unusable.
    """
    train, valid = (RankerRows(files, split, ranker) for split in ("train", "valid"))
    if len(train) < tune.batch_size:
        raise DataError(
            f"{len(train)} training prompts do not fill one batch of tune.batch_size={tune.batch_size}: lower "
            "tune.batch_size, or make more examples (see sequences.* and candidates.*)"
        )
    missing = [
        {
            "table": "candidates",
            "source": str(files.sequences / "candidates" / f"{split}.parquet"),
            "key": f"{example_id} {note_id}",
            "reason": f"there is no note {note_id!r}",
        }
        for split, rows in (("train", train), ("valid", valid))
        for example_id, note_id in rows.missing
    ]
    if missing:
        (output / "quarantine").mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(missing, schema=QUARANTINE_SCHEMA)
        pq.write_table(table, output / "quarantine" / "candidates.parquet")
    return {
        "prompts": len(train),
        "quarantined": len(missing),
        "without_preference": train.candidates.without_preference + valid.candidates.without_preference,
    }
