"""The test candidates of one protocol as arrays, and tables of scores brought into their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import CANDIDATE_SCHEMA, EXAMPLE_SCHEMA, SCORE_SCHEMA, require_columns
from notellm2_ray.evaluate.ranking.metrics import check_groups

log = logging.getLogger(__name__)

STRATA = ("all", "warm", "cold")


@dataclass(frozen=True)
class RankingTask:
    """The candidates of a protocol's test examples.

    Attributes:
        protocol: its name.
        example_ids: (E,) object array, in the order in which the candidates name them.
        note_ids: (R,) object array of candidates.
        groups: (R,) int64, the example of each row.
        labels: (R,) bool, true for targets.
        user_groups: (E,) int64, the user of each example; the statistics resample users.
        cold: (E,) bool: whether the target has no clicks besides those that are validation or test targets.
    """

    protocol: str
    example_ids: np.ndarray
    note_ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    user_groups: np.ndarray
    cold: np.ndarray

    @classmethod
    def build(cls, protocol: str, candidates: pa.Table, examples: pa.Table, clicks: Mapping[str, int]) -> RankingTask:
        """The arrays of a protocol's candidates.

        Args:
            protocol: its name, for messages and tables.
            candidates: CANDIDATE_SCHEMA.
            examples: EXAMPLE_SCHEMA, with every example that the candidates name.
            clicks: number of positive events of each note, without validation and test targets; 0 if not listed.

        Raises:
            DataError: there are no candidates, an example is unknown, or an example does not have exactly one target
                and at least one negative.
        """
        require_columns(candidates.schema, CANDIDATE_SCHEMA, f"candidates of {protocol}")
        require_columns(examples.schema, EXAMPLE_SCHEMA, f"examples of {protocol}")
        if not candidates.num_rows:
            raise DataError(f"protocol {protocol} has no test candidates: are there test users with two events?")
        names = candidates.column("example_id").to_pylist()
        number = {name: at for at, name in enumerate(dict.fromkeys(names))}
        users = dict(
            zip(examples.column("example_id").to_pylist(), examples.column("user_id").to_pylist(), strict=True)
        )
        unknown = [name for name in number if name not in users]
        if unknown:
            raise DataError(
                f"{len(unknown)} examples of the candidates of {protocol} are not in its examples file, such as "
                f"{unknown[0]!r}: run the sequences stage again"
            )
        groups = np.array([number[name] for name in names], dtype=np.int64)
        labels = candidates.column("label").to_numpy().astype(bool)
        check_groups(groups, labels, len(number))
        notes = np.array(candidates.column("note_id").to_pylist(), dtype=object)
        cold = np.zeros(len(number), dtype=bool)
        cold[groups[labels]] = [clicks.get(note, 0) == 0 for note in notes[labels]]
        user_number = {user: at for at, user in enumerate(dict.fromkeys(users[name] for name in number))}
        user_groups = np.array([user_number[users[name]] for name in number], dtype=np.int64)
        return cls(protocol, np.array(list(number), dtype=object), notes, groups, labels, user_groups, cold)

    @property
    def num_examples(self) -> int:
        return len(self.example_ids)

    def mask(self, stratum: str) -> np.ndarray:
        """(E,) bool: the examples of a stratum: all, or those with a warm or a cold target."""
        return {"all": np.ones(self.num_examples, dtype=bool), "warm": ~self.cold, "cold": self.cold}[stratum]

    def subset(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Some examples: (R,) bool mask of their rows, and their groups (R',) and user groups (E',), renumbered."""
        rows = mask[self.groups]
        renumbered = np.cumsum(mask) - 1
        users = np.unique(self.user_groups[mask], return_inverse=True)[1]
        return rows, renumbered[self.groups[rows]], users

    def candidates_of(self, example: int) -> np.ndarray:
        """Rows of one example."""
        return np.flatnonzero(self.groups == example)

    def align(self, scores: pa.Table, where: str) -> np.ndarray:
        """(R,) float64 scores in the task's order.

        A candidate without a score (quarantined while scoring) counts against the method: such a target is ranked below
        everything, such a negative above everything.

        Args:
            scores: SCORE_SCHEMA, in any order.
            where: where the scores come from, for messages.

        Raises:
            DataError: a row is there twice, a label differs, a score is NaN, or more than half of the candidates have
                no score.
        """
        require_columns(scores.schema, SCORE_SCHEMA, where)
        keys = list(zip(scores.column("example_id").to_pylist(), scores.column("note_id").to_pylist(), strict=True))
        row_of = {key: row for row, key in enumerate(keys)}
        if len(row_of) != len(keys):
            raise DataError(f"{where}: {len(keys) - len(row_of)} candidates are scored twice: score again")
        places = np.array(
            [row_of.get((self.example_ids[e], note), -1) for e, note in zip(self.groups, self.note_ids, strict=True)]
        )
        found = places >= 0
        self._check(scores, places, found, where)
        values = np.where(self.labels, -np.inf, np.inf)
        values[found] = scores.column("score").to_numpy().astype(np.float64)[places[found]]
        return values

    def _check(self, scores: pa.Table, places: np.ndarray, found: np.ndarray, where: str) -> None:
        missing = int((~found).sum())
        if missing > len(found) / 2:
            raise DataError(
                f"{where}: {missing} of {len(found)} candidates of {self.protocol} have no score; do these scores "
                "belong to these sequences? Score again"
            )
        if missing:
            log.warning("%s: %d candidates have no score and count against the method", where, missing)
        labels = scores.column("label").to_numpy().astype(bool)[places[found]]
        if not np.array_equal(labels, self.labels[found]):
            raise DataError(f"{where}: labels differ from those of the candidates of {self.protocol}: score again")
        if np.isnan(scores.column("score").to_numpy()).any():
            raise DataError(f"{where}: NaN among the scores")

    def scores_by_note(self, values: Mapping[str, int]) -> np.ndarray:
        """(R,) one value per note, such as its clicks; a note without one has 0."""
        return np.array([values.get(note, 0) for note in self.note_ids], dtype=np.float64)

    def random_scores(self, seed: int) -> np.ndarray:
        """(R,) uniform random scores."""
        return np.random.default_rng(stream_seed(seed, "random scores", self.protocol)).random(len(self.groups))
