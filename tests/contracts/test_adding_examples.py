"""The examples of docs/adding.md do what the page says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from notellm2_ray import cli
from notellm2_ray.baselines.ranking.data import RankingData, read_protocol
from notellm2_ray.baselines.ranking.table import RANKING_BASELINES
from notellm2_ray.baselines.recall.baseline import RecallData
from notellm2_ray.baselines.recall.table import RECALL_BASELINES
from notellm2_ray.core.schema import NOTE_SCHEMA, PAIR_SCHEMA, Note
from notellm2_ray.core.settings import EvaluateSettings, ModelSettings, Settings, TrainSettings
from notellm2_ray.core.settings.sources import SOURCES
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.evaluate.recall.task import RetrievalTask
from notellm2_ray.models.embedder.kinds import EMBEDDERS
from notellm2_ray.models.embedder.vectors import NOTE, NoteVectors
from notellm2_ray.pipeline import table
from notellm2_ray.train.objectives import OBJECTIVES
from tests.support import ROOT, ranking_workspace

PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")


def example(heading: str) -> Any:
    """The names that the Python block under a heading of the page defines."""
    code = PAGE.partition(f"\n## {heading}\n")[2].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, f"docs/adding.md, {heading}", "exec"), names)
    return SimpleNamespace(**names)


def test_the_recall_baseline_ranks_notes_that_share_topics_first():
    topics = {"a": ("x", "y"), "b": ("x", "y"), "c": ("x",), "d": ()}
    notes = {note_id: Note(note_id, topics=shown) for note_id, shown in topics.items()}
    pairs = pa.Table.from_pylist(
        [{"query_id": "a", "target_id": target, "score": 1.0} for target in "bcd"], PAIR_SCHEMA
    )
    task = RetrievalTask.build(pairs, list(notes), dict.fromkeys(notes, 1), EvaluateSettings())
    baseline = example("A recall baseline").BASELINE
    (ranks,) = baseline.ranks(RecallData(task, notes, Workspace("."), Settings())).values()
    assert ranks.tolist() == [1, 2, 3]


def test_the_ranking_baseline_counts_liked_notes_of_the_same_topic(tmp_path):
    ranking_workspace.write_sequences(tmp_path / "sequences")
    notes = [
        {"note_id": note, "title": "", "topics": [f"kind {at % 2}"], "content": "", "created_at": None, "image": None}
        for at, note in enumerate(ranking_workspace.NOTES)
    ]
    ranking_workspace.save(tmp_path / "prepared" / "notes" / "part.parquet", notes, NOTE_SCHEMA)
    workspace, settings = Workspace(tmp_path), ranking_workspace.settings_for(tmp_path)
    protocol = read_protocol(workspace, "uniform")
    baseline = example("A ranking baseline").BASELINE
    (scores,) = baseline.scores(RankingData(settings, workspace, [protocol], "llm", "tower"), protocol).values()
    # Each user's history and target have one topic.
    assert set(scores[protocol.task.labels]) == {5.0}
    assert set(np.unique(scores)) == {0.0, 5.0}


@pytest.mark.slow
def test_the_step_counts_notes(tmp_path, monkeypatch, ray_cluster):
    monkeypatch.setattr(table, "STAGES", list(table.STAGES))
    monkeypatch.setattr(cli, "STAGES", table.STAGES)
    table.add_stage(example("A step").STAGE)
    arguments = [f"workspace={tmp_path}", "source.num_notes=40", "source.num_users=10"]
    cli.main(["prepare", *arguments])
    cli.main(["count-notes", *arguments])
    assert int((tmp_path / "note_count" / "count.json").read_text()) == pytest.approx(40, abs=3)


def test_the_objective_is_lower_for_notes_near_to_their_related_ones():
    loss = example("A training objective").sigmoid(ModelSettings(), TrainSettings())
    near, far = torch.eye(2).repeat(2, 1), torch.eye(2)[[0, 1, 1, 0]]
    keys, temperature = torch.arange(4), torch.tensor(3.0)
    losses = [float(loss(NoteVectors({NOTE: vectors}, {}, temperature), keys)) for vectors in (near, far)]
    assert losses[0] < losses[1]


def test_the_groups_are_those_of_the_code():
    for rows in (SOURCES, RECALL_BASELINES, RANKING_BASELINES, EMBEDDERS, OBJECTIVES):
        assert f"| `{rows.group}` |" in PAGE
