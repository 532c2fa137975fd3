"""The rows of the ranking tables that no language model made: random, popularity, GRU4Rec and SASRec.

What the sequential ones are trained on, so that they know no more than the ranker may: the whole sequences of the
training users; of validation and test users only what came before their target; of users whose target is neither (not
tested) all but their last event. Split by time, nothing from the first validation target's moment on, of anybody.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import BaselineName, ProtocolName
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.evaluate.ranking.task import RankingTask

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.sequential import NoteFeatures, SequentialRecommender

log = logging.getLogger("notellm2_ray")

Scores = dict[int | None, np.ndarray]


class Protocol(NamedTuple):
    """One protocol's test data."""

    task: RankingTask
    examples: pa.Table  # EXAMPLE_SCHEMA
    clicks: dict[str, int]  # what may be known of popularity

    def histories(self) -> list[list[str]]:
        """Notes before each example of the task, oldest first."""
        ids, histories = self.examples.column("example_id"), self.examples.column("history_ids")
        by_id = dict(zip(ids.to_pylist(), histories.to_pylist(), strict=True))
        return [by_id[example] for example in self.task.example_ids]


def read_protocol(workspace: Workspace, name: ProtocolName) -> Protocol:
    """A protocol's candidates, examples and popularity."""
    published = name == "published"
    examples = _read(workspace.examples("published" if published else "test"))
    table = _read(workspace.popularity(name))
    clicks = dict(zip(table.column("note_id").to_pylist(), table.column("clicks").to_pylist(), strict=True))
    candidates = _read(workspace.candidates(name))
    return Protocol(RankingTask.build(name, candidates, examples, clicks), examples, clicks)


class Baselines:
    """All baselines of some settings; each sequential one is trained once per seed and file of test examples."""

    def __init__(
        self, settings: Settings, workspace: Workspace, protocols: Iterable[Protocol], *, llm: str, vision: str
    ):
        """Prepare; nothing is trained or read yet.

        Args:
            workspace: where sequences/, prepared/ and image_summaries/ lie.
            protocols: all that will be asked for: their notes' features are read at once.
            llm: directory or name of the LLM whose states of image summaries gru4rec_summary reads.
            vision: tower whose pooled vectors gru4rec_image reads, unless ``ranking.image_tower`` names another.
        """
        self._settings, self._workspace, self._protocols = settings, workspace, list(protocols)
        self._llm, self._tower = llm, settings.ranking.image_tower or vision
        self._features: dict[str, NoteFeatures] = {}
        self._trained: dict[tuple[str, int, bool], SequentialRecommender] = {}

    def scores(self, name: BaselineName, protocol: Protocol) -> Scores:
        """A baseline's scores of a protocol's candidates, by seed.

        Raises:
            DataError: it has nothing to be trained on; ModelError: its weights are not there.
        """
        seeds, task = self._settings.ranking.seeds, protocol.task
        if name == "popularity":
            return {None: task.scores_by_note(protocol.clicks)}
        if name == "newest":
            return {None: task.scores_by_note(self._births())}
        if name == "random":
            return {seed: task.random_scores(seed) for seed in seeds}
        rows = [task.candidates_of(example) for example in range(task.num_examples)]
        candidates = [[str(note) for note in task.note_ids[row]] for row in rows]
        found: Scores = {}
        for seed in seeds:
            model = self._model(name, seed, task.protocol == "published")
            values = np.empty(len(task.groups))
            for row, scores in zip(rows, model.scores(protocol.histories(), candidates), strict=True):
                values[row] = scores
            found[seed] = values
        return found

    def _model(self, name: str, seed: int, published: bool) -> SequentialRecommender:
        from notellm2_ray.baselines.ranking.sequential import fit

        key = (name, seed, published)
        if key not in self._trained:
            log.info("training the baseline %s, seed %d", name, seed)
            sequences, validation = training_data(self._settings, self._workspace, published=published)
            features = self._note_features(name)
            self._trained[key] = fit(
                "sasrec" if name == "sasrec" else "gru4rec", sequences, validation, seed=seed, features=features
            )
        return self._trained[key]

    def _note_features(self, name: str) -> NoteFeatures | None:
        if name in ("gru4rec", "sasrec"):
            return None
        if name not in self._features:
            from notellm2_ray.baselines.ranking.features import image_features, text_features

            if name == "gru4rec_image":
                self._features[name] = image_features(self._images(), self._tower)
            else:
                model = self._settings.model
                self._features[name] = text_features(
                    self._summaries(), self._llm, attention=model.attention, revision=model.revision
                )
        return self._features[name]

    def _births(self) -> dict[str, int]:
        """When each note was created, in microseconds.

        Raises:
            DataError: no note says.
        """
        notes = ds.dataset(self._workspace.notes).to_table(columns=["note_id", "created_at"])
        dated = notes.filter(pc.is_valid(notes["created_at"]))
        if not len(dated):
            raise DataError("the row newest needs notes with created_at: leave it out of ranking.baselines")
        born = dated["created_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
        return dict(zip(dated["note_id"].to_pylist(), born.to_pylist(), strict=True))

    def _used_notes(self) -> set[str]:
        """Notes of any sequence, or that any protocol asks for."""
        sequences = _read(self._workspace.sequence_table).column("note_ids")
        used = {note for notes in sequences.to_pylist() for note in notes}
        return used | {note for protocol in self._protocols for note in protocol.task.note_ids}

    def _images(self) -> Iterator[tuple[str, bytes | None]]:
        wanted = ds.field("note_id").isin(pa.array(sorted(self._used_notes())))
        notes = ds.dataset(self._workspace.notes)
        for batch in notes.to_batches(columns=["note_id", "image"], filter=wanted, batch_size=256):
            for note_id, image in zip(batch.column("note_id"), batch.column("image"), strict=True):
                yield note_id.as_py(), image.as_py()

    def _summaries(self) -> dict[str, str]:
        used = self._used_notes()
        return {note: text for note, text in read_summaries(self._workspace).items() if note in used}


def training_data(
    settings: Settings, workspace: Workspace, *, published: bool
) -> tuple[list[list[str]], list[tuple[list[str], str]]]:
    """What a sequential baseline may be trained on (see the module), and the validation examples.

    Args:
        settings: how targets were split.
        workspace: where its sequences lie.
        published: the published protocol's test targets are held out, instead of the users' last events.

    Returns:
        Training sequences of note ids, and (history, target) of the validation users.
    """
    valid = _read(workspace.examples("valid"))
    tests = [_read(workspace.examples("published" if published else "test"))]
    held_out: dict[str, set[str]] = {}
    for table in (valid, *tests):
        for user, target in zip(
            table.column("user_id").to_pylist(), table.column("target_id").to_pylist(), strict=True
        ):
            held_out.setdefault(user, set()).add(target)
    training = set(_read(workspace.examples("train")).column("user_id").to_pylist())
    until = (
        min(valid.column("timestamp").to_pylist()) if settings.candidates.split_by == "time" and len(valid) else None
    )
    rows = []
    for row in _read(workspace.sequence_table).to_pylist():
        notes = known_part(row["note_ids"], held_out.get(row["user_id"], set()), trained=row["user_id"] in training)
        rows.append(_before(notes, row["timestamps"], until))
    targets = zip(valid.column("history_ids").to_pylist(), valid.column("target_id").to_pylist(), strict=True)
    return [row for row in rows if row], [(history, target) for history, target in targets if history]


def known_part(notes: list[str], held_out: set[str], *, trained: bool) -> list[str]:
    """The beginning of a sequence that may be learned from.

    Args:
        notes: the sequence, oldest first.
        held_out: the user's validation or test targets: only what came before the first is taken, and nothing where
            the target is older than what is kept of the sequence.
        trained: without such targets, whether it is a training user, whose sequence is taken whole; of others the last
            event is a target that is not tested, and left out.
    """
    if held_out:
        return notes[: next((at for at, note in enumerate(notes) if note in held_out), 0)]
    return notes if trained or len(notes) == 1 else notes[:-1]


def read_summaries(workspace: Workspace) -> dict[str, str]:
    """Note id to image summary; empty where none were made."""
    path = workspace.summary_table
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["note_id", "summary"])
    return dict(zip(table.column("note_id").to_pylist(), table.column("summary").to_pylist(), strict=True))


def read_statistics(workspace: Workspace) -> Mapping[str, object]:
    """What the sequences stage tells of its data."""
    return json.loads(workspace.sequence_statistics.read_text(encoding="utf-8"))


def _before(notes: list[str], timestamps: list[datetime], until: datetime | None) -> list[str]:
    if until is None:
        return notes
    return [note for note, at in zip(notes, timestamps[: len(notes)], strict=True) if at < until]


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"{path} does not exist: run the sequences stage with these candidates.protocols first")
    return pq.read_table(path)
