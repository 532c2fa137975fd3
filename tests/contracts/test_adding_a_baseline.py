"""A new baseline is one function and one row: toys from outside the package reach the tables and the report."""

import json

import numpy as np
import pytest

from notellm2_ray import cli
from notellm2_ray.baselines.ranking.baseline import RankingBaseline
from notellm2_ray.baselines.ranking.data import read_table
from notellm2_ray.baselines.ranking.table import RANKING_BASELINES
from notellm2_ray.baselines.recall.baseline import RecallBaseline
from notellm2_ray.baselines.recall.table import RECALL_BASELINES
from notellm2_ray.core.run import MANIFEST
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.recall_comparison import compare
from notellm2_ray.presets import load_settings
from tests.support import ranking_workspace, recall_workspace


def longest_title(data):
    """Recall: the notes with the longest titles first, for any query."""
    return {None: data.task.ranks_by_note({note_id: len(note.title) for note_id, note in data.notes.items()})}


def already_seen(data, protocol):
    """Ranking: by the number of sequences that hold a candidate; each seed breaks ties differently."""
    sequences = read_table(data.workspace.sequence_table).column("note_ids").to_pylist()
    seen = protocol.task.scores_by_note({note: sum(note in one for one in sequences) for note in data.used_notes()})
    return {seed: seen + np.random.default_rng(seed).random(len(seen)) for seed in data.seeds}


@pytest.fixture(autouse=True)
def toys():
    """Both rows, during a test."""
    RECALL_BASELINES.add("longest_title", RecallBaseline("text", longest_title))
    RANKING_BASELINES.add(
        "already_seen",
        RankingBaseline(already_seen, remark=lambda data: f"already_seen: seeds {data.seeds}."),
    )
    yield
    RECALL_BASELINES.remove("longest_title")
    RANKING_BASELINES.remove("already_seen")


def test_a_recall_baseline_reaches_the_table_and_the_report(tmp_path):
    workspace = recall_workspace.write(tmp_path / "workspace")
    settings = load_settings(None, None, [f"workspace={workspace}", "evaluate.baselines=[random,longest_title]"])
    output = tmp_path / "report"
    output.mkdir()
    compare(settings, Workspace(workspace), [], str(workspace / "llm"), output)
    rows = {row["method"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    assert list(rows) == ["random", "longest_title"]
    assert rows["longest_title"]["inputs"] == "text"
    assert rows["longest_title"]["recall"]["all"]["10"]["mean"] > rows["random"]["recall"]["all"]["10"]["mean"]
    for name in ("table.txt", "index.html"):
        assert "longest_title" in (output / name).read_text()


def test_a_ranking_baseline_goes_through_the_command_line_into_the_table_and_the_report(tmp_path, capsys):
    ranking_workspace.write_sequences(tmp_path / "sequences")
    ranking_workspace.write_sequences(tmp_path / "seeds" / "2" / "sequences", draws=2)  # each seed draws negatives
    for stage in ("sequences", "seeds/2/sequences", "prepared"):
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / MANIFEST).write_text(json.dumps({"fingerprint": stage, "counts": {}}))
    names = "ranking.baselines=[random,popularity,already_seen]"
    rest = ("ranking.rankers=[]", "ranking.controls=[]", "ranking.seeds=[1,2]", "candidates.protocols=[uniform]")
    cli.main(["eval-ranking", f"workspace={tmp_path}", names, *rest])
    assert "\nalready_seen " in capsys.readouterr().out
    output = tmp_path / "report" / "ranking"
    results = json.loads((output / "results.json").read_text())
    (one,) = results["protocols"].values()
    assert [row["method"] for row in one["rows"]] == ["random", "popularity", "already_seen"]
    assert [row["seeds"] for row in one["rows"]] == [[1, 2]] * 3
    assert one["rows"][1]["figures"]["all"]["auc"]["deviation"] > 0  # popularity among other negatives
    # no row is left out of the comparison of the best with the second
    assert "already_seen" in {name for test in one["tests"] for name in (test["method"], test["against"])}
    assert "already_seen: seeds (1, 2)." in results["remarks"]
    for name in ("table.txt", "index.html"):
        assert "already_seen" in (output / name).read_text()
