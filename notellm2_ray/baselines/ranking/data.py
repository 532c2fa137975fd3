"""What ranking baselines are given: each protocol's test data, and the outputs of earlier stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.baselines.kept import Kept
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import ProtocolName
from notellm2_ray.core.summary_table import read_summaries
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.evaluate.ranking.task import RankingTask


class ProtocolData(NamedTuple):
    """One protocol's test data."""

    task: RankingTask
    examples: pa.Table  # EXAMPLE_SCHEMA
    clicks: dict[str, int]  # clicks of each note that a popularity baseline may know

    def histories(self) -> list[list[str]]:
        """Note ids before each example of the task, oldest first."""
        ids, histories = self.examples.column("example_id"), self.examples.column("history_ids")
        by_id = dict(zip(ids.to_pylist(), histories.to_pylist(), strict=True))
        return [by_id[example] for example in self.task.example_ids]


def read_protocol(workspace: Workspace, name: ProtocolName) -> ProtocolData:
    """A protocol's candidates, examples and popularity, as the sequences stage wrote them.

    Raises:
        DataError: it did not write this protocol.
    """
    examples = read_table(workspace.examples("published" if name == "published" else "test"))
    table = read_table(workspace.popularity(name))
    clicks = dict(zip(table.column("note_id").to_pylist(), table.column("clicks").to_pylist(), strict=True))
    candidates = read_table(workspace.candidates(name))
    return ProtocolData(RankingTask.build(name, candidates, examples, clicks), examples, clicks)


@dataclass(frozen=True)
class RankingData(Kept):
    """What a ranking baseline may read besides the protocol that it scores.

    Attributes:
        settings: those of the run.
        workspace: where the sequences, the prepared notes and the image summaries lie. There are summaries for certain
            only if the baseline needs "image_summaries".
        protocols: all protocols that will be scored.
        llm: directory or hub name of the embedder's LLM.
        image_tower: directory or name of the vision tower: ``ranking.image_tower``, or else the embedder's.
        tuned: what the search for a baseline's knobs tried, by name; a baseline that searches adds itself.
    """

    settings: Settings
    workspace: Workspace
    protocols: Sequence[ProtocolData]
    llm: str
    image_tower: str
    tuned: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that a random or trained baseline gives scores for."""
        return self.settings.ranking.seeds

    def used_notes(self) -> set[str]:
        """Ids of the notes that are in a sequence or among the candidates of a protocol."""
        sequences = read_table(self.workspace.sequence_table).column("note_ids")
        used = {note for notes in sequences.to_pylist() for note in notes}
        return used | {note for protocol in self.protocols for note in protocol.task.note_ids}

    def images(self) -> Iterator[tuple[str, bytes | None]]:
        """Id and encoded image (None: it has none) of each used note."""
        wanted = ds.field("note_id").isin(pa.array(sorted(self.used_notes())))
        batches = ds.dataset(self.workspace.notes).to_batches(
            columns=["note_id", "image"], filter=wanted, batch_size=256
        )
        for batch in batches:
            for note_id, image in zip(batch.column("note_id"), batch.column("image"), strict=True):
                yield note_id.as_py(), image.as_py()

    def summaries(self) -> dict[str, str]:
        """Note id to image summary, of the used notes that have one."""
        used = self.used_notes()
        return {note: text for note, text in read_summaries(self.workspace.summary_table).items() if note in used}


def read_table(path: Path) -> pa.Table:
    """A table of the sequences stage.

    Raises:
        DataError: it is not there.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: run the sequences stage with these candidates.protocols first")
    return pq.read_table(path)
