"""The front page shows and links the halves that are there."""

import json

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.schema import PAIR_SCHEMA
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.core.settings.retrieval import EvaluateSettings
from notellm2_ray.evaluate.front_page import write_front_page
from notellm2_ray.evaluate.ranking.results import MethodScores, evaluate_protocol
from notellm2_ray.evaluate.ranking.task import RankingTask
from notellm2_ray.evaluate.recall.results import MethodRanks, evaluate
from notellm2_ray.evaluate.recall.task import RetrievalTask
from tests.support.ranking_task import clicks, noisy, tables
from tests.support.report_pages import check_page


def write_ranking(home):
    task = RankingTask.build("uniform", *tables(20), clicks(20))
    methods = [MethodScores("mllm_msr", "ranker", {1: noisy(task, 3.0, 1)})]
    results = evaluate_protocol(task, methods, RankEvaluateSettings(cutoffs=(1, 5)), 7)
    (home / "ranking").mkdir()
    (home / "ranking" / "results.json").write_text(json.dumps({"protocols": {"uniform": results}}))
    for name in ("index.html", "report.md", "table.txt"):
        (home / "ranking" / name).touch()


def write_recall(home):
    pairs = pa.table({"query_id": ["a"], "target_id": ["b"], "score": [1.0]}, schema=PAIR_SCHEMA)
    task = RetrievalTask.build(pairs, list("abc"), {"a": 90, "b": 90}, EvaluateSettings())
    recall = evaluate(task, [MethodRanks("bm25", "text", {None: np.array([1])}, "baseline")])
    (home / "retrieval").mkdir()
    (home / "retrieval" / "results.json").write_text(json.dumps(recall))


def test_only_the_half_that_is_there_is_linked(tmp_path):
    write_ranking(tmp_path)
    write_front_page(tmp_path)
    html = check_page(tmp_path / "index.html", ("ranking/", "#"))
    assert 'href="ranking/index.html"' in html
    assert "retrieval/" not in html
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "[as Markdown](ranking/report.md) · [as text](ranking/table.txt)" in text


def test_recall_comes_before_ranking(tmp_path):
    write_recall(tmp_path)
    write_front_page(tmp_path)
    assert "bm25" in (tmp_path / "index.html").read_text(encoding="utf-8")
    write_ranking(tmp_path)
    write_front_page(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("## Recall") < text.index("## Ranking: uniform negatives")


def test_no_half_and_a_damaged_one_are_errors(tmp_path):
    with pytest.raises(OutputError, match="no evaluation"):
        write_front_page(tmp_path)
    (tmp_path / "ranking").mkdir()
    (tmp_path / "ranking" / "results.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        write_front_page(tmp_path)
