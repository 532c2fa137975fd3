"""The ranking report: hostile text stays text, all parts are there, nothing outside is fetched."""

import re

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.schema import BLOCK_SCHEMA, Note
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.evaluate.ranking.report import write_report
from notellm2_ray.evaluate.ranking.results import MethodScores, evaluate_protocol
from notellm2_ray.evaluate.ranking.samples import sample_users
from notellm2_ray.evaluate.ranking.tables import printed, ranking_table, significance_table
from notellm2_ray.evaluate.ranking.task import RankingTask
from tests.support.ranking_task import clicks, noisy, tables
from tests.support.report_pages import HOSTILE, check_page, picture

SETTINGS = RankEvaluateSettings(cutoffs=(1, 5))
SWEEP = {
    "name": "block_size",
    "parameter": "sequences.block_size",
    "points": [
        {"value": 1, "metrics": {"auc": 0.7}, "error": None},
        {"value": 2, "metrics": {}, "error": f"it broke {HOSTILE}"},
        {"value": 3, "metrics": {"auc": 0.8}, "error": None},
    ],
}


def evaluated(protocol):
    task = RankingTask.build(protocol, *tables(20), clicks(20))
    methods = [
        MethodScores("popularity", "baseline", {None: task.scores_by_note(clicks(20))}),
        MethodScores("mllm_msr", "ranker", {seed: noisy(task, 3.0, seed) for seed in (1, 2)}),
        MethodScores("<b>direct</b>", "ranker", {seed: noisy(task, 1.0, seed) for seed in (1, 2)}),
        MethodScores("mllm_msr, shuffled image", "control", {1: noisy(task, 0.0, 8)}),
    ]
    return task, methods, evaluate_protocol(task, methods, SETTINGS, 7)


def get_notes(ids):
    images = {"t1": None, "h": b"no image at all"}
    return {one: Note(one, HOSTILE, (), "", images.get(one, picture())) for one in ids if one != "n3-0"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "ranking"
    output.mkdir()
    task, methods, uniform = evaluated("uniform")
    results = {"protocols": {"uniform": uniform, "popular": evaluated("popular")[2]}, "remarks": [HOSTILE]}
    blocks = pa.table({"user_id": ["u0", "u1"], "block": [0, 0], "note_ids": [["h"], ["h"]]}, BLOCK_SCHEMA)
    samples = sample_users(
        task,
        methods[1].scores[1],
        tables(20)[1],
        blocks,
        get_notes=get_notes,
        summaries={"h": f"a red square {HOSTILE}"},
        preferences={("u0", 0): f"The user likes {HOSTILE}"},
        method="mllm_msr",
        count=99,
        seed=1,
    )
    history = [{"step": step, "loss": 1 / (1 + step), "valid_auc": 0.5 + step / 30} for step in range(9)]
    write_report(
        output,
        results=results,
        statistics={"users": 20, "lengths": {"mean": 3.5, "max": 7}},
        histories={"mllm_msr-seed42": history},
        samples=samples,
        settings={"workspace": "</pre>" + HOSTILE},
        sweeps=[SWEEP],
    )
    return output, samples


def test_hostile_text_becomes_no_tag_and_nothing_is_fetched(report):
    html = check_page(report[0] / "index.html", ("data:image/", "#"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;b&gt;direct&lt;/b&gt;" in html
    assert "{{ 7*7 }}" in html


def test_every_part_is_there(report):
    html = (report[0] / "index.html").read_text(encoding="utf-8")
    for part in ("Uniform negatives", "Sweep of sequences.block_size", "Training", "Dataset", "Users", "Settings"):
        assert f"<h2>{part}</h2>" in html
    assert html.count("<h2>Significance") == 2
    plots = {path.name for path in report[0].glob("*.png") if "dark" not in path.name}
    assert plots == {
        "auc_uniform.png",
        "auc_popular.png",
        "sweep_block_size.png",
        "training_loss.png",
        "training_auc.png",
    }
    assert html.count('class="badge">target') == 20
    for shown in ("user u13", "no image", "image unreadable", "The user likes", "a red square"):
        assert shown in html


def test_markdown_shows_hostile_text_literally(report):
    text = (report[0] / "report.md").read_text(encoding="utf-8")
    outside_of_listing = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<![\\])<", outside_of_listing)
    assert not re.search(r"(?<![\\!])\[a\]\(", outside_of_listing)
    for name in re.findall(r"(?<!\\)!\[[^\]]*\]\(([^)]*)\)", outside_of_listing):
        assert (report[0] / name).is_file()


def test_users_are_shown_with_their_history_and_the_target_after_its_ties(report):
    samples = report[1]
    assert len(samples) == 20
    for user in samples:
        assert [note["rank"] for note in user["candidates"]] == list(range(1, 7))
        assert sum(note["is_target"] for note in user["candidates"]) == 1
        scores = [note["score"] for note in user["candidates"]]
        assert scores == sorted(scores, reverse=True)
        assert [note["note_id"] for block in user["blocks"] for note in block["notes"]] == ["h"]
    assert samples[0]["blocks"][0]["preference"].startswith("The user likes")
    assert samples[1]["blocks"][0]["preference"] is None
    task = evaluated("uniform")[0]
    none = sample_users(
        task, np.zeros(len(task.groups)), tables(20)[1], BLOCK_SCHEMA.empty_table(),
        get_notes=get_notes, summaries={}, preferences={}, method="x", count=3, seed=1,
    )  # fmt: skip
    assert [user["target_rank"] for user in none] == [6, 6, 6]


def test_tables_say_what_was_measured():
    results = evaluated("uniform")[2]
    table = ranking_table(results)
    assert [row[0] for row in table.rows] == ["popularity", "mllm_msr", "<b>direct</b>", "mllm_msr, shuffled image"]
    assert table.columns[:4] == ("Method", "Seeds", "AUC", "AUC, 95% interval")
    assert "±" in table.rows[1][2]
    assert (1, 2) in table.strong
    tests = significance_table(results, ("ablation", "control"))
    assert {row[1] for row in tests.rows} == {"<b>direct</b>", "mllm_msr, shuffled image"}
    assert r"\<b\>direct" in table.markdown()
    one = {"protocols": {"uniform": results}}
    assert "Uniform negatives: 20 targets of 20 users, each among 6 candidates" in printed(one)
