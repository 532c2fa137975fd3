"""From the directories of the stages to the report."""

import json

import pytest

from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.ranking_comparison import compare_ranking
from notellm2_ray.pipeline.ranking_outputs import Scored
from tests.support import ranking_workspace
from tests.support.ranking_workspace import settings_for, write_scores


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return ranking_workspace.write(tmp_path_factory.mktemp("workspace"))


@pytest.mark.slow
def test_everything_is_compared_and_reported(workspace, tmp_path):
    names = ["random", "popularity", "gru4rec", "sasrec", "gru4rec_image", "gru4rec_summary", "untuned"]
    ranking = {"baselines": names, "rankers": ["mllm_msr", "tallrec"], "tune_baselines": True}
    settings = settings_for(workspace, ranking={**ranking, "baseline_grid": {"learning_rate": [1e-5, 3e-3]}})
    (workspace / "seeds").mkdir()
    (workspace / "seeds" / "2").symlink_to(workspace, target_is_directory=True)  # of the second seed
    scores = {}
    for protocol in ("uniform", "popular"):
        tables = [
            (Scored("mllm_msr", "mllm_msr", 1, "shuffled_image", protocol), 0.1),
            *((Scored("untuned", "mllm_msr", seed, None, protocol, tuned=False), 0.1) for seed in (None, 2)),
            *((Scored(name, name, seed, None, protocol), 0.9) for name in ("mllm_msr", "tallrec") for seed in (1, 2)),
        ]
        for at, (table, strength) in enumerate(tables):
            path = tmp_path / protocol / f"{at}.parquet"
            scores[table] = write_scores(path, protocol, workspace, strength, at)
    output = tmp_path / "report"
    output.mkdir()
    counts = compare_ranking(settings, Workspace(workspace), scores, output)
    assert counts["uniform_targets"] == 10
    assert counts["uniform_auc_mllm_msr"] > 0.8
    results = json.loads((output / "results.json").read_text())
    for one in results["protocols"].values():
        assert [row["method"] for row in one["rows"]] == [*names, "mllm_msr", "tallrec", "mllm_msr, shuffled image"]
        assert all(row["seeds"] == [1, 2] for row in one["rows"] if row["kind"] != "control")
        found = {row["method"]: row["figures"]["all"]["user_auc"]["mean"] for row in one["rows"]}
        # the id tells the next note of the circle; images and summaries tell only its kind
        assert min(found["gru4rec"], found["sasrec"]) > 0.9
        assert min(found["gru4rec_image"], found["gru4rec_summary"]) > 0.55
    tuned = {"gru4rec", "sasrec", "gru4rec_image", "gru4rec_summary"}
    assert set(results["tuned_baselines"]) == tuned | {f"{name}, seed 2" for name in tuned}
    for one in results["tuned_baselines"].values():
        assert [point["knobs"] for point in one["points"]] == [{"learning_rate": 1e-5}, {"learning_rate": 3e-3}]
        (chosen,) = [point for point in one["points"] if point["chosen"]]
        assert chosen["validation_auc"] == max(point["validation_auc"] for point in one["points"])
    assert results["tuned_baselines"]["gru4rec"]["points"][1]["chosen"]  # the other rate is too small to learn anything
    assert "mllm_msr, shuffled image" in (output / "table.txt").read_text()
    html = (output / "index.html").read_text(encoding="utf-8")
    assert html.count("The user likes kind") == 6
    assert html.count('class="badge">target') == 3
    assert "red round cat" in html
    assert "Tuned baselines" in html
    assert "gru4rec_summary: mean of the last states" in html
