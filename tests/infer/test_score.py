"""Scores: vLLM's equal the model's own, controls exchange one thing, and a kill costs only the parts being scored."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from notellm2_ray.core.candidate_rows import CandidateRow
from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.schema import SCORE_SCHEMA
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer import score, score_worker
from notellm2_ray.infer.parts import quarantine_table
from notellm2_ray.infer.score import ScoreTable, score_candidates
from notellm2_ray.infer.score_parts import CandidatePart, ScoredPart, compile_scores, plan_parts, scored_parts
from notellm2_ray.infer.score_questions import Controls, Questions, ScoreFiles
from notellm2_ray.models.ranker.inputs import Question
from tests.support import ROOT
from tests.support import ranker_training as material
from tests.support.processes import end_family, named, when


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return material.write(tmp_path_factory.mktemp("material"), test_negatives=8)


def _files(directory: Path, store: Path, preferences: bool = True) -> ScoreFiles:
    from notellm2_ray.core.candidate_rows import store_notes

    sequences = directory / "sequences"
    likes = directory / "preferences.parquet" if preferences else None
    files = ScoreFiles(sequences / "test.parquet", sequences / "candidates" / "uniform.parquet", likes, store)
    if not store.exists():
        store_notes(directory / "notes", {f"n{i}" for i in range(material.NUM_NOTES)}, store)
    return files


def test_parts_hold_whole_examples():
    example_of = np.array([4, 4, 1, 1, 1, 4, 2])
    parts = plan_parts(example_of, 3, "model")
    assert [part.places for part in parts] == [[2, 3, 4], [6, 0, 1, 5]]
    assert parts == plan_parts(example_of, 3, "model")
    assert {part.part_id for part in parts}.isdisjoint(part.part_id for part in plan_parts(example_of, 3, "other"))
    assert plan_parts(np.empty(0, np.int64), 3, "model") == []


def test_parts_are_compiled_in_the_order_of_the_plan(tmp_path):
    store, parts = scored_parts(tmp_path), [CandidatePart("000000-abc", [0]), CandidatePart("000001-def", [1])]
    store.clear_leftovers([])
    for part in reversed(parts):
        row = {"example_id": part.part_id, "note_id": "n", "label": 1, "score": 0.5}
        counts = {"scored": 1, "quarantined": 1, "prompt_tokens": 10, "cached_tokens": 4}
        done = ScoredPart(part_id=part.part_id, model_fingerprint="m", **counts)
        store.commit(done, pa.Table.from_pylist([row], schema=SCORE_SCHEMA), quarantine_table("c", "s", [("e", "bad")]))
    assert store.finished("000000-abc").candidates == 2
    assert compile_scores(store, parts) == 2
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.schema.equals(SCORE_SCHEMA) and table["example_id"].to_pylist() == ["000000-abc", "000001-def"]
    assert compile_scores(store, []) == 0 and pq.read_schema(tmp_path / "scores.parquet").equals(SCORE_SCHEMA)


def test_questions_say_what_is_there(directory, tmp_path):
    files = _files(directory, tmp_path / "notes.arrow")
    questions = Questions(files, material.ranker_settings(), Controls())
    shown = questions(range(len(questions.rows)))
    cold = [question for row, question in shown if row.example_id.startswith(("u0/", "u1/"))]
    assert all(question.preference is None for question in cold)
    assert all(question.preference.startswith("likes") for row, question in shown if question not in cold)
    assert {row.note_id for row, question in shown if question.image is None} == {"n3", "n7", "n11", "n15"}
    tallrec = Questions(files, material.ranker_settings(variant="tallrec", max_history=2), Controls())
    row, question = tallrec([len(shown) - 1])[0]
    assert len(question.history_titles) == 2 and len(row.history_ids) == 3


def test_controls_exchange_one_thing_and_nothing_else(directory, tmp_path):
    files = _files(directory, tmp_path / "notes.arrow")
    every = range(9 * 12)

    def shown(**changes: Any) -> list:
        return Questions(files, material.ranker_settings(), Controls(**changes))(every)

    plain, image, taste = shown(), shown(shuffled_image=True), shown(other_preference=True)
    assert image == shown(shuffled_image=True) and image != shown(shuffled_image=True, seed=1)
    for (row, one), (_, two), (_, three) in zip(plain, image, taste, strict=True):
        assert one._replace(image=None) == two._replace(image=None)
        assert (one.image is None) == (two.image is None)
        assert one._replace(preference=None) == three._replace(preference=None)
        assert (one.preference is None) == (three.preference is None)
        assert row == plain[plain.index((row, one))][0]
    assert any(one.image != two.image for (_, one), (_, two) in zip(plain, image, strict=True))
    by_example = {row.example_id: question.preference for row, question in taste}
    assert all(question.preference == by_example[row.example_id] for row, question in taste)
    without = _files(directory, tmp_path / "notes.arrow", preferences=False)
    with pytest.raises(DataError, match="other_preference"):
        Questions(without, material.ranker_settings(), Controls(other_preference=True))


def test_images_of_a_part_are_decoded_side_by_side():
    together = threading.Barrier(3, timeout=20)

    def image(question):
        together.wait()
        return question.title

    prompter: Any = SimpleNamespace(prompt=lambda question: [len(question.title)], image=image)
    rows = [CandidateRow("e", f"n{number}", 0, None, ()) for number in range(4)]
    asked = [(row, Question(row.note_id)) for row in rows[:3]] + [(rows[3], "there is no note")]
    requests, bad = score_worker._requests(lambda _: asked, prompter, range(4), 3)
    assert [(one.row, one.image) for one in requests] == [(row, row.note_id) for row in rows[:3]]
    assert bad == [("e n3", "there is no note")]


LAYOUTS = ("shared_prefix", "image_first")


# --- with vLLM ------------------------------------------------------------------------------------------------------


def _tables(directory: Path, output: Path, *layouts: str) -> list[ScoreTable]:
    sequences = directory / "sequences"
    return [
        ScoreTable(
            material.ranker_settings(layout=layout),
            sequences / "test.parquet",
            sequences / "candidates" / "uniform.parquet",
            directory / "preferences.parquet",
            output / layout,
        )
        for layout in layouts
    ]


def _score(directory: Path, tables: list[ScoreTable], **changes: Any) -> list[dict[str, Any]]:
    generation = {"dtype": "float32", "max_model_len": 512, "max_sequences": 4, "cpus_per_engine": 1, **changes}
    return score_candidates(directory / "mllm", GenerationSettings(**generation), directory / "notes", tables)


def _own_scores(directory: Path, store: Path, layout: str) -> dict[tuple[str, str], float]:
    """P(yes) as Hugging Face's own forward pass has it, one candidate at a time."""
    from notellm2_ray.models.chat import ChatTokenizer, load_processor
    from notellm2_ray.models.ranker.inputs import RankerPreprocessor, RankerPrompter
    from notellm2_ray.models.ranker.model import answer_probability, forward_logits, load_network

    settings, path = material.ranker_settings(layout=layout), str(directory / "mllm")
    network, chat = load_network(path, torch.float32).eval(), ChatTokenizer.from_pretrained(path)
    preprocessor = RankerPreprocessor(RankerPrompter(chat, settings), load_processor(path))
    questions = Questions(_files(directory, store), settings, Controls())
    found = {}
    with torch.no_grad():
        for row, question in questions(range(len(questions.rows))):
            batch = preprocessor.collate([preprocessor.features(question)])
            told = answer_probability(lambda b, p: forward_logits(network, b, p), batch, chat.yes_id, chat.no_id)
            found[row.example_id, row.note_id] = float(told)
    return found


def _table(output: Path) -> dict[tuple[str, str], float]:
    rows = pq.read_table(output / "scores.parquet").to_pylist()
    return {(row["example_id"], row["note_id"]): row["score"] for row in rows}


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, directory, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """Both layouts, scored by one engine, and their counts."""
    output = tmp_path_factory.mktemp("undisturbed")
    return output, _score(directory, _tables(directory, output, *LAYOUTS))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_scores_as_the_model_itself_does(undisturbed, directory, tmp_path, layout):
    output, counts = undisturbed[0] / layout, undisturbed[1][LAYOUTS.index(layout)]
    found, own = _table(output), _own_scores(directory, tmp_path / "notes.arrow", layout)
    assert found.keys() == own.keys() and counts["scored"] == counts["candidates"] == 108
    assert np.ptp(list(own.values())) > 0.01
    assert [found[key] for key in own] == pytest.approx(list(own.values()), abs=2e-4)
    assert counts["computed_tokens"] + counts["cached_tokens"] == counts["prompt_tokens"]
    assert {path.name for path in output.iterdir()} == {"parts", "quarantine", "scores.parquet"}


@pytest.mark.slow
def test_a_users_candidates_share_their_prefix(undisturbed):
    shared, image_first = undisturbed[1]
    assert shared["cached_tokens"] > 0.3 * shared["prompt_tokens"]
    assert shared["computed_tokens"] < image_first["computed_tokens"]


@pytest.mark.slow
def test_a_finished_job_is_not_done_again(undisturbed, directory):
    began = time.monotonic()
    again = _score(directory, _tables(directory, undisturbed[0], *LAYOUTS))
    assert time.monotonic() - began < 5
    assert [one["parts_reused"] for one in again] == [one["parts"] for one in undisturbed[1]]


def _same(output: Path, reference: Path) -> None:
    found, expected = _table(output / "shared_prefix"), _table(reference / "shared_prefix")
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=2e-4)


@pytest.mark.slow
def test_a_killed_engine_and_driver_cost_only_the_parts_being_scored(undisturbed, directory, tmp_path):
    program = "import sys; from pathlib import Path; from tests.infer.test_score import _driver; _driver(*sys.argv[1:])"
    output = tmp_path / "shared_prefix"
    with open(tmp_path / "log", "w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", program, str(directory), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "."},
            stdout=log,
            stderr=log,
        )
        engines: list[psutil.Process] = []
        family: list[psutil.Process] = []

        def kill_engine() -> None:
            engines.extend(named(driver.pid, "PartScorer"))
            for process in engines:
                process.kill()

        def kill_driver() -> None:
            family.extend(psutil.Process(driver.pid).children(recursive=True))
            driver.kill()

        when(lambda: len(_parts(output)) >= 2, kill_engine).join(240)
        before = _parts(output)
        when(lambda: len(_parts(output)) >= len(before) + 2, kill_driver).join(240)
        driver.wait()
        end_family([process.pid for process in family])
    left = _parts(output)
    assert engines and len(left) >= 4 and not (output / "scores.parquet").exists()
    assert before.items() <= left.items()
    (counts,) = _score(directory, _tables(directory, tmp_path, "shared_prefix"))
    assert counts["parts_reused"] == len(left) < counts["parts"]
    assert left.items() <= _parts(output).items()
    _same(tmp_path, undisturbed[0])


def _parts(output: Path) -> dict[str, int]:
    """When each part was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "parts").glob("*.parquet")}


def _driver(directory: str, output: str) -> None:
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.core.settings import RaySettings

    connect(RaySettings(num_cpus=4, object_store_gb=0.2))
    _score(Path(directory), _tables(Path(directory), Path(output), "shared_prefix"))


@pytest.mark.slow
def test_bfloat16_leaves_no_ties(undisturbed, directory, tmp_path):
    _score(directory, _tables(directory, tmp_path, "shared_prefix"), dtype="bfloat16")
    found, exact = _table(tmp_path / "shared_prefix"), _table(undisturbed[0] / "shared_prefix")
    assert len(set(found.values())) >= len(set(exact.values())) - 3
    assert list(found.values()) == pytest.approx([exact[key] for key in found], abs=0.1)


class StandIn:
    """An engine that gives every candidate the same score and refuses long prompts, as vLLM does."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens

    async def generate(self, request: dict[str, Any], params: Any, name: str) -> AsyncIterator[Any]:
        if len(request["prompt_token_ids"]) >= self.most_tokens:
            raise ValueError("the prompt is longer than the maximum model length")
        logprobs = {token: SimpleNamespace(logprob=-1.0) for token in params.logprob_token_ids}
        outputs = [SimpleNamespace(logprobs=[logprobs])]
        yield SimpleNamespace(outputs=outputs, prompt_token_ids=request["prompt_token_ids"], num_cached_tokens=0)

    def shutdown(self) -> None:
        pass


@pytest.fixture
def most_tokens() -> int:
    """Of a prompt that the stand-in accepts."""
    return 512


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> None:
    """Parts are scored one after another in this process, by the actor itself with the stand-in as its engine."""

    def run(job: score_worker.ScoreJob, parts: list[CandidatePart]) -> Generator[tuple[Path, ScoredPart]]:
        actor = score_worker.PartScorer(job)
        for part in parts:
            yield job.tables[part.table].output, actor.make(part)

    monkeypatch.setattr(score, "_run", run)
    monkeypatch.setattr(score_worker, "engine_environment", lambda generation: {})
    monkeypatch.setattr(score_worker.PartScorer, "_compare", lambda *_: None)  # a stand-in expands no image
    monkeypatch.setattr(score_worker, "start_engine", lambda *_, **__: StandIn(most_tokens))


@pytest.mark.slow  # vLLM is imported for its parameters
def test_missing_notes_are_quarantined_up_to_a_share(in_process, tmp_path):
    broken = material.write(tmp_path / "broken", missing=("n0", "n1"))
    with pytest.raises(DataError, match=r"got no score, more than 5%; reasons: u\d+/\d n[01]: there is no note"):
        _score(broken, _tables(broken, tmp_path, "shared_prefix"))


@pytest.mark.slow
@pytest.mark.parametrize("most_tokens", [124])  # with an image's single placeholder the longest prompt has 123 tokens
def test_a_prompt_that_the_engine_refuses_is_quarantined(in_process, directory, tmp_path):
    (counts,) = _score(directory, _tables(directory, tmp_path, "shared_prefix"))
    rows = pq.read_table(tmp_path / "shared_prefix" / "quarantine").to_pylist()
    assert 0 < counts["quarantined"] == len(rows) and counts["scored"] + len(rows) == 108
    assert all("vLLM refuses the prompt" in row["reason"] for row in rows)
    assert all("generation.max_model_len" in row["reason"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("most_tokens", [64])
def test_prompts_that_are_all_refused_are_an_error_that_names_the_setting(in_process, directory, tmp_path):
    with pytest.raises(ModelError, match=r"vLLM refuses the prompt.*generation.max_model_len"):
        _score(directory, _tables(directory, tmp_path, "shared_prefix"))


def test_prompts_that_cannot_fit_are_refused_before_an_engine_starts(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"Raise generation.max_model_len=128, or lower ranker.max_title_tokens"):
        _score(directory, _tables(directory, tmp_path, "shared_prefix"), max_model_len=128)
