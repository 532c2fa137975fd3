"""The tables of one part of the users, and one Parquet file of all parts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.history_blocks import BlockRule
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import QUARANTINE_SCHEMA
from notellm2_ray.core.settings import CandidateSettings, SequenceSettings
from notellm2_ray.data.event_log import hash_strings
from notellm2_ray.data.sequences import targets as t
from notellm2_ray.data.sequences.blocks import block_table, number_blocks, sequence_table
from notellm2_ray.data.sequences.histories import Histories
from notellm2_ray.data.sequences.negatives import Liked, Pool, num_eligible, sample, shuffle_keys
from notellm2_ray.data.sequences.statistics import tally

EVER = -(1 << 62)  # as a birth in microseconds: before everything
SMOOTHING = 10  # popularity-matched negatives: weight clicks + 1/10, so that a note nobody clicked can be drawn at all
TOO_FEW_NOTES = "too few notes"
_ROW_GROUP = 65_536
_DAY = 24 * 60 * 60 * 1_000_000  # microseconds

POPULARITY_SCHEMA = pa.schema(
    [pa.field("note_id", pa.string(), nullable=False), pa.field("clicks", pa.int64(), nullable=False)]
)
_PUBLISHED = ("published", "published_blocks")


def table_names(protocols: Sequence[str]) -> list[str]:
    """The tables of a part; one named ``candidates-x`` ends in ``candidates/x.parquet``."""
    names = ["sequences", "blocks", *t.SIDES, *(_PUBLISHED if "published" in protocols else ())]
    return names + [f"candidates-{name}" for name in (t.TRAIN, t.VALID, *protocols)]


class NoteFacts(NamedTuple):
    """What is known of each note, by code; (number of notes,) each."""

    births: np.ndarray  # int64 microseconds: from then on the note may be a negative
    clicks: np.ndarray  # int64, users, none of them through a held-out target
    every_click: np.ndarray  # int64, users
    alive: np.ndarray  # bool: may be a candidate


class PartWriter:
    """Makes all tables of some users; what it makes of a user does not depend on who else is there."""

    def __init__(
        self,
        vocabulary: pa.Array,
        notes: NoteFacts,
        split: t.TargetSplit,
        sequences: SequenceSettings,
        candidates: CandidateSettings,
        seed: int,
    ) -> None:
        self.vocabulary, self.notes, self.split, self.seed = vocabulary, notes, split, seed
        self.sequences, self.candidates = sequences, candidates
        self.rule = BlockRule.from_settings(sequences)
        days = candidates.max_negative_age_days
        self._max_age = None if days is None else round(days * _DAY)
        ones = np.ones(len(notes.births), np.int64)
        self.pools = {
            "uniform": Pool.build(notes.births, ones, notes.alive),
            "popular": Pool.build(notes.births, SMOOTHING * notes.clicks + 1, notes.alive),
            "published": Pool.build(ones * EVER, ones, notes.alive),
        }

    def write(self, full: Histories) -> tuple[dict[str, pa.Table], dict[str, Any]]:
        """The tables of :func:`table_names`, ``quarantine``, and counts and tallies.

        Args:
            full: whole histories: events that are not kept are no negatives either.
        """
        kept = full.last(self.sequences.max_events)
        numbers = number_blocks(kept, self.rule)
        sides = self._sides(full)
        owners = np.isin(sides, t.SIDES)[kept.owners]
        blocks = block_table(kept.filter(owners), numbers[owners], self.vocabulary)
        tables = {"sequences": sequence_table(kept, self.vocabulary), "blocks": blocks}
        tables["quarantine"] = QUARANTINE_SCHEMA.empty_table()
        answer = self._describe(full, kept, sides) | {"blocks": blocks.num_rows}
        answer["published_targets"] = np.zeros(0, np.int64)
        for side in t.SIDES:
            choose = t.last_targets
            if side == t.TRAIN and self.candidates.train_targets == "every_block":
                choose = t.block_targets
            self._add(side, self._draws(side), full, kept, choose(kept, numbers, sides == side), tables, answer)
        if "published" in self.candidates.protocols:
            self._add_published(full.filter((sides == t.TEST)[full.owners]), tables, answer)
        return tables, answer

    def _add_published(self, full: Histories, tables: dict[str, pa.Table], answer: dict[str, Any]) -> None:
        six = t.published_histories(full, self.notes.every_click)
        numbers = number_blocks(six, BlockRule(self.sequences.block_size))  # published: by size, always
        tables["published_blocks"] = block_table(six, numbers, self.vocabulary)
        examples = t.last_targets(six, numbers, np.ones(len(six.users), bool))
        examples = self._add("published", {"published": "published"}, full, six, examples, tables, answer)
        answer["published_targets"] = six.notes[examples.targets(six)].astype(np.int64)

    def _add(
        self,
        name: str,
        draws: dict[str, str],
        full: Histories,
        kept: Histories,
        examples: t.Examples,
        tables: dict[str, pa.Table],
        answer: dict[str, Any],
    ) -> t.Examples:
        """Add the examples called ``name`` and, for each of ``draws``, its candidates from the pool named there."""
        count = self.candidates.num_train_negatives if name == t.TRAIN else self.candidates.num_negatives
        pool = self.pools["published" if name == "published" else "uniform"]
        liked = Liked.build(full.owners, full.notes, pool)
        targets = examples.targets(kept)
        max_age = None if name == "published" else self._max_age
        eligible = num_eligible(pool, liked, examples.users, kept.times[targets], max_age)
        short = (eligible < count) & bool(draws)
        tables["quarantine"] = pa.concat_tables(
            [tables["quarantine"], _too_few(t.example_ids(kept, examples), eligible, short, count)]
        )
        answer |= {f"{name}_short": int(short.sum()), f"{name}_all": len(short), f"{name}_short_example": ""}
        if short.any():
            worst = int(np.argmin(eligible))
            answer[f"{name}_short_example"] = f"{t.example_ids(kept, examples)[worst]} has {eligible[worst]}"
        examples, targets = t.Examples(*(column[~short] for column in examples)), targets[~short]
        tables[name] = t.example_table(kept, examples, self.vocabulary)
        for protocol, source in draws.items():
            ids = tables[name]["example_id"].combine_chunks()
            keys = hash_strings(ids, f"{stream_seed(self.seed, 'candidates', protocol):016x}")
            pool = self.pools[source]
            liked = Liked.build(full.owners, full.notes, pool)
            negatives = sample(pool, liked, keys, examples.users, kept.times[targets], count, max_age)
            tables[f"candidates-{protocol}"] = t.candidate_table(
                ids, kept.notes[targets], negatives, shuffle_keys(keys, count + 1), self.vocabulary
            )
        answer[f"{name}_examples"] = len(targets)
        answer[f"{name}_history"] = tally(examples.positions)
        # A target's own click is among those counted, but that of a validation or test user is held out.
        own = {t.TRAIN: self.notes.clicks - 1, "published": self.notes.every_click - 1}
        clicks = own.get(name, self.notes.clicks)
        answer[f"{name}_targets_never_clicked"] = int((clicks[kept.notes[targets]] == 0).sum())
        return examples

    def _draws(self, side: str) -> dict[str, str]:
        """File of candidates to the pool that its negatives come from, for the examples of a side."""
        if side != t.TEST:
            return {side: "uniform"}
        return {name: name for name in self.candidates.protocols if name != "published"}

    def _sides(self, full: Histories) -> np.ndarray:
        sides = self.split.sides(full.users, full.times[full.offsets[1:] - 1])
        return np.where(full.lengths >= self.sequences.min_events, sides, "none").astype(object)

    def _describe(self, full: Histories, kept: Histories, sides: np.ndarray) -> dict[str, Any]:
        return {
            "users": len(full.users),
            "interactions": len(full.notes),
            "cold_users": int((sides == "none").sum()),
            "untested_users": int((sides == t.UNTESTED).sum()),
            "truncated_users": int((full.lengths > kept.lengths).sum()),
            "truncated_events": len(full.notes) - len(kept.notes),
            "lengths": tally(full.lengths),
        }


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema, at least one, as a Parquet file that appears whole. Row groups are of a fixed size,
    so that the file does not depend on how the rows are cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    arriving = iter(tables)
    waiting = next(arriving)
    with pq.ParquetWriter(temporary, waiting.schema) as writer:
        for table in arriving:
            waiting = pa.concat_tables([waiting, table])
            whole = waiting.num_rows // _ROW_GROUP * _ROW_GROUP
            if whole:
                writer.write_table(waiting.slice(0, whole), row_group_size=_ROW_GROUP)
                waiting = waiting.slice(whole)
        writer.write_table(waiting, row_group_size=_ROW_GROUP)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _too_few(ids: pa.Array, eligible: np.ndarray, short: np.ndarray, count: int) -> pa.Table:
    reasons = [
        f"{TOO_FEW_NOTES}: {number} notes that the user did not like could be negatives at the target's time, {count} "
        "are needed"
        for number in eligible[short]
    ]
    keys = ids.filter(pa.array(short))
    columns = [pa.array([word] * len(reasons), pa.string()) for word in ("examples", "sequences")]
    return pa.table([*columns, keys, pa.array(reasons, pa.string())], schema=QUARANTINE_SCHEMA)
