"""The report: hostile text stays text, all parts are there, and nothing outside is fetched."""

import re

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.schema import PAIR_SCHEMA, Note
from notellm2_ray.core.settings.retrieval import EvaluateSettings
from notellm2_ray.evaluate.recall.report import write_report
from notellm2_ray.evaluate.recall.results import MethodRanks, evaluate
from notellm2_ray.evaluate.recall.samples import sample_neighbors
from notellm2_ray.evaluate.recall.task import RetrievalTask
from tests.support.report_pages import HOSTILE, check_page, picture


def pair_table(pairs) -> pa.Table:
    columns = {"query_id": [query for query, _ in pairs], "target_id": [target for _, target in pairs]}
    return pa.table({**columns, "score": [1.0] * len(pairs)}, schema=PAIR_SCHEMA)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    notes = [f"n{row}" for row in range(30)]
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    settings = EvaluateSettings(cutoffs=(5, 10, 100), short_tokens=50)
    pairs = [(notes[row], notes[row + 10]) for row in range(12)]
    task = RetrievalTask.build(pair_table(pairs), notes, dict.fromkeys(notes, 10), settings)
    ranks = task.embedding_ranks(np.array(notes, dtype=object), vectors)
    rankings = [
        MethodRanks("bm25", "text", {None: task.random_ranks(7)}, "baseline"),
        MethodRanks("<b>x</b>", "multimodal", {42: ranks, 43: ranks}),
        MethodRanks("<b>x</b>", "image", {42: ranks, 43: ranks}),
    ]

    def get(ids):
        images = {"n1": b"no image at all", "n2": None}
        return [Note(note_id, HOSTILE, (), "", images.get(note_id, picture())) for note_id in ids]

    samples = sample_neighbors(
        task, np.array(notes, dtype=object), vectors, get, method="<b>x</b>", count=30, k=3, seed=1
    )
    write_report(
        output,
        results=evaluate(task, rankings, reference="bm25"),
        statistics={"train": {"num_notes": 3}, "test": {"num_notes": 4, "words_per_title": 2.5}},
        histories={
            "x-seed42": [{"step": s, "loss": 3 / (s + 1), "validation": {"recall@100": s / 9}} for s in range(9)]
        },
        samples=samples,
        settings={"workspace": "</pre>" + HOSTILE},
        index_info={"kind": "ivf", "recall_at_100": 0.9912},
    )
    return output, samples


def test_hostile_text_becomes_no_tag_and_nothing_is_fetched(report):
    html = check_page(report[0] / "index.html", ("data:image/", "#"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7*7 }}" in html
    assert 'name="viewport"' in html


def test_markdown_shows_hostile_text_literally(report):
    text = (report[0] / "report.md").read_text(encoding="utf-8")
    outside_of_listing = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<", outside_of_listing)
    assert not re.search(r"(?<!\\)\[a", outside_of_listing)
    assert r"\<script\>" in outside_of_listing
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", outside_of_listing):
        assert (report[0] / name).is_file()


def test_every_part_is_there(report):
    html = (report[0] / "index.html").read_text(encoding="utf-8")
    for part in (
        "Recall",
        "Recall by input",
        "Recall curves",
        "Training",
        "Significance",
        "Dataset",
        "Index",
        "Neighbours",
    ):
        assert f"<h2>{part}</h2>" in html
    plots = {path.name for path in report[0].glob("*.png")}
    light = {"recall_all.png", "recall_short_query.png", "training_loss.png", "training_recall.png"}
    assert plots == light | {name.replace(".png", "_dark.png") for name in light}
    assert "0.9912" in html
    assert "image unreadable" in html
    assert "no image" in html


def test_samples_show_the_nearest_and_wherever_the_target_is(report):
    samples = report[1]
    assert len(samples) == 12  # all queries, since 30 were asked for
    for sample in samples:
        first = [note["rank"] for note in sample["neighbors"]][:3]
        assert first == [1, 2, 3]
        assert sample["query"]["note_id"] not in [note["note_id"] for note in sample["neighbors"]]
        (target,) = [note for note in sample["neighbors"] if note["is_target"]]
        assert int(target["note_id"][1:]) == int(sample["query"]["note_id"][1:]) + 10


def test_a_report_without_training_or_samples_can_be_written(tmp_path):
    task = RetrievalTask.build(pair_table([("a", "b")]), list("abc"), {"a": 90, "b": 90}, EvaluateSettings())
    results = evaluate(task, [MethodRanks("bm25", "text", {None: np.array([1])}, "baseline")])
    write_report(tmp_path, results=results, statistics={}, histories={}, samples=[], settings={}, index_info={})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Training" not in html
    assert "Neighbours" not in html
