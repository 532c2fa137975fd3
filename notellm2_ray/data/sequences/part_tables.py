"""All tables of one part of the users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from notellm2_ray.core.history_blocks import BlockRule
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import QUARANTINE_SCHEMA
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings
from notellm2_ray.data.arrays import mix
from notellm2_ray.data.sequences.histories import Histories
from notellm2_ray.data.sequences.negatives import Liked, Pool, num_eligible, sample, shuffle_keys
from notellm2_ray.data.sequences.note_facts import EVER, NoteFacts
from notellm2_ray.data.sequences.split import SIDES, TEST, TRAIN, UNTESTED, VALID, UserSplit
from notellm2_ray.data.sequences.statistics import tally
from notellm2_ray.data.sequences.tables import block_table, candidate_table, example_ids, example_table, sequence_table
from notellm2_ray.data.sequences.targets import Examples, block_targets, last_targets, published_histories

SMOOTHING = 10  # weight of popular negatives: clicks + 1/10, so that a note without clicks can be drawn too
TOO_FEW_NOTES = "too few notes"
_DAY = 24 * 60 * 60 * 1_000_000  # microseconds
_PUBLISHED = ("published", "published_blocks")


def table_names(protocols: Sequence[str]) -> list[str]:
    """The tables of a part; one named ``candidates-x`` is written to ``candidates/x.parquet``."""
    names = ["sequences", "blocks", *SIDES, *(_PUBLISHED if "published" in protocols else ())]
    return names + [f"candidates-{name}" for name in (TRAIN, VALID, *protocols)]


class PartTables:
    """The tables of some users. A user's rows do not depend on the other users.

    Attributes:
        tables: those of :func:`table_names`, and ``quarantine``.
        counts: counts and tallies of the part, for the statistics.
    """

    def __init__(
        self,
        histories: Histories,
        vocabulary: pa.Array,
        notes: NoteFacts,
        split: UserSplit,
        sequences: SequenceSettings,
        candidates: CandidateSettings,
        seed: int,
    ) -> None:
        """Make all tables.

        Args:
            histories: whole histories. Notes that ``sequences.max_events`` leaves out are not negatives either.
            vocabulary: all note ids.
            seed: of the negatives.
        """
        self.vocabulary, self.notes, self.seed = vocabulary, notes, seed
        self.sequences, self.candidates = sequences, candidates
        days = candidates.max_negative_age_days
        self._max_age = None if days is None else round(days * _DAY)
        ones = np.ones(len(notes.births), np.int64)
        self._pools = {
            "uniform": Pool.build(notes.births, ones, notes.in_core),
            "popular": Pool.build(notes.births, SMOOTHING * notes.clicks + 1, notes.in_core),
            "published": Pool.build(ones * EVER, ones, notes.in_core),
        }
        self.tables: dict[str, pa.Table] = {"quarantine": QUARANTINE_SCHEMA.empty_table()}
        self.counts: dict[str, Any] = {"published_targets": np.zeros(0, np.int64)}
        self._add_all(histories, self._sides(histories, split))

    def _sides(self, histories: Histories, split: UserSplit) -> np.ndarray:
        sides = split.sides(histories.keys, histories.times[histories.offsets[1:] - 1])
        return np.where(histories.lengths >= self.sequences.min_events, sides, "none").astype(object)

    def _add_all(self, full: Histories, sides: np.ndarray) -> None:
        kept = full.last(self.sequences.max_events)
        numbers = kept.block_numbers(BlockRule.from_settings(self.sequences))
        owners = np.isin(sides, SIDES)[kept.owners]
        self.tables["sequences"] = sequence_table(kept, self.vocabulary)
        self.tables["blocks"] = block_table(kept.filter(owners), numbers[owners], self.vocabulary)
        self._count_users(full, kept, sides)
        for side in SIDES:
            every_block = side == TRAIN and self.candidates.train_targets == "every_block"
            choose = block_targets if every_block else last_targets
            self._add_examples(side, self._pool_names(side), full, kept, choose(kept, numbers, sides == side))
        if "published" in self.candidates.protocols:
            self._add_published(full.filter((sides == TEST)[full.owners]))

    def _count_users(self, full: Histories, kept: Histories, sides: np.ndarray) -> None:
        tied = kept.tied
        last = tied[kept.offsets[1:] - 1]
        self.counts |= {
            "tied_events": int((tied | np.append(tied[1:], False)[: len(tied)]).sum()),
            "tied_targets": int(last[sides != "none"].sum()),
            "users": len(full.users),
            "interactions": len(full.notes),
            "cold_users": int((sides == "none").sum()),
            "untested_users": int((sides == UNTESTED).sum()),
            "truncated_users": int((full.lengths > kept.lengths).sum()),
            "truncated_events": len(full.notes) - len(kept.notes),
            "lengths": tally(full.lengths),
            "blocks": self.tables["blocks"].num_rows,
        }

    def _pool_names(self, side: str) -> dict[str, str]:
        """File of candidates -> pool that its negatives come from, for the examples of a side."""
        if side != TEST:
            return {side: "uniform"}
        return {name: name for name in self.candidates.protocols if name != "published"}

    def _add_published(self, full: Histories) -> None:
        chosen = published_histories(full, self.notes.every_click)
        numbers = chosen.block_numbers(BlockRule(self.sequences.block_size))  # always by size
        self.tables["published_blocks"] = block_table(chosen, numbers, self.vocabulary)
        examples = last_targets(chosen, numbers, np.ones(len(chosen.users), bool))
        examples = self._add_examples("published", {"published": "published"}, full, chosen, examples)
        self.counts["published_targets"] = chosen.notes[examples.targets(chosen)].astype(np.int64)

    def _add_examples(
        self, name: str, pool_names: dict[str, str], full: Histories, kept: Histories, examples: Examples
    ) -> Examples:
        """Add the examples called ``name``, and a file of candidates for each of ``pool_names``.

        Returns:
            the examples that have enough negatives.
        """
        count = self.candidates.num_train_negatives if name == TRAIN else self.candidates.num_negatives
        max_age = None if name == "published" else self._max_age
        examples = self._with_negatives(name, full, kept, examples, count if pool_names else 0, max_age)
        targets = examples.targets(kept)
        self.tables[name] = example_table(kept, examples, self.vocabulary)
        ids = self.tables[name]["example_id"].combine_chunks()
        for protocol, pool_name in pool_names.items():
            keys = _example_keys(kept, examples, stream_seed(self.seed, "candidates", protocol))
            pool = self._pools[pool_name]
            liked = Liked.build(full.owners, full.notes, pool)
            negatives = sample(pool, liked, keys, examples.users, kept.times[targets], count, max_age)
            self.tables[f"candidates-{protocol}"] = candidate_table(
                ids, kept.notes[targets], negatives, shuffle_keys(keys, count + 1), self.vocabulary
            )
        self._count_examples(name, examples, kept.notes[targets])
        return examples

    def _with_negatives(
        self, name: str, full: Histories, kept: Histories, examples: Examples, count: int, max_age: int | None
    ) -> Examples:
        """The examples with at least ``count`` notes to draw negatives from; the others go to quarantine."""
        pool = self._pools["published" if name == "published" else "uniform"]
        liked = Liked.build(full.owners, full.notes, pool)
        eligible = num_eligible(pool, liked, examples.users, kept.times[examples.targets(kept)], max_age)
        short = eligible < count
        ids = example_ids(kept, examples)
        self.tables["quarantine"] = pa.concat_tables(
            [self.tables["quarantine"], _too_few_notes(ids.filter(pa.array(short)), eligible[short], count)]
        )
        worst = int(np.argmin(eligible)) if short.any() else 0
        self.counts |= {
            f"{name}_all": len(short),
            f"{name}_set_aside": int(short.sum()),
            f"{name}_set_aside_example": f"{ids[worst]} has {eligible[worst]}" if short.any() else "",
        }
        return Examples(*(column[~short] for column in examples))

    def _count_examples(self, name: str, examples: Examples, targets: np.ndarray) -> None:
        # A target's own click is among those counted, except for validation and test users, whose targets are held out.
        own = {TRAIN: self.notes.clicks - 1, "published": self.notes.every_click - 1}
        clicks = own.get(name, self.notes.clicks)
        self.counts |= {
            f"{name}_examples": len(targets),
            f"{name}_history": tally(examples.positions),
            f"{name}_targets_never_clicked": int((clicks[targets] == 0).sum()),
        }


def _example_keys(histories: Histories, examples: Examples, seed: int) -> np.ndarray:
    """(X,) uint64, a random number for each example, from its user's key and its target's position."""
    return mix(histories.keys[examples.users] ^ mix(examples.positions.astype(np.uint64) ^ np.uint64(seed)))


def _too_few_notes(ids: pa.Array, eligible: np.ndarray, count: int) -> pa.Table:
    reasons = [
        f"{TOO_FEW_NOTES}: {number} notes that the user did not like could be negatives at the target's time, {count} "
        "are needed"
        for number in eligible
    ]
    columns = [pa.array([word] * len(reasons), pa.string()) for word in ("examples", "sequences")]
    return pa.table([*columns, ids, pa.array(reasons, pa.string())], schema=QUARANTINE_SCHEMA)
