"""The whole system on real weights: a chat LM, a vision encoder and a sentence encoder. `make test-real` runs it.

NOTELLM2_REAL names the directory that tests/real/checkpoints.py has filled.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import ROOT

HOME = os.environ.get("NOTELLM2_REAL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not HOME, reason="real checkpoints are downloaded and tried by `make test-real`"),
]
LM, TOWER, SENTENCES = (Path(HOME or "").absolute() / name for name in ("smollm2-135m", "dinov2-small", "minilm-l6"))
# Fewer users would make pairs of chance. Prompts of whole texts, and embedding in float32, would take twice the time.
WORLD = [
    *("--preset", "demo", "source.num_notes=1000", "embed.by_modality=false"),
    *("embed.precision=bf16", "model.max_body_tokens=64"),
]
EMBEDDER = [
    *(f"model.llm={LM}", f"model.vision={TOWER}", "model.attention=sdpa", "train.lora={rank: 16}"),
    *("train.batch_pairs=12", "train.max_steps=30", "train.validate_every_steps=30", "train.max_validation_pairs=32"),
    *("evaluate.embedders=[notellm2]", "evaluate.inputs=[multimodal]", "evaluate.sample_queries=3"),
    *("evaluate.baselines=[bm25,sentence_encoder,random]", f"evaluate.sentence_encoder={SENTENCES}"),
]
IN_WORDS = [
    *(f"preferences.model={LM}", f"ranker.model={LM}", "preferences.variant=no_image_summary"),
    *(
        "ranking.rankers=[tallrec]",
        "ranking.controls=[]",
        "ranking.baselines=[random,popularity]",
    ),  # it reads no images
    *("sequences.max_events=6", "candidates.train_targets=last", "candidates.max_test_users=12"),
    *("tune.batch_size=8", "tune.max_steps=6", "tune.validate_every_steps=6", "tune.max_validation_examples=4"),
]


def notellm2(verb: str, workspace: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "notellm2_ray.cli", verb, *WORLD, f"workspace={workspace}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A workspace with the recall half done."""
    home = tmp_path_factory.mktemp("real") / "world"
    notellm2("run-retrieval", home, *EMBEDDER)
    return home


@pytest.mark.timeout(1800)
def test_an_embedder_of_real_models_leaves_the_plateau_and_finds_related_notes(workspace):
    (history,) = workspace.glob("embedders/*/history.jsonl")
    losses = [row["loss"] for row in map(json.loads, history.read_text().splitlines()) if "loss" in row]
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < 0.9 * math.log(23)
    results = json.loads((workspace / "report" / "retrieval" / "results.json").read_text())
    found = {row["method"]: row["recall"]["all"]["10"]["mean"] for row in results["rows"]}
    assert found["notellm2"] > 2 * found["random"] and found["sentence_encoder"] > 2 * found["random"]


@pytest.mark.timeout(600)
def test_what_was_trained_is_a_plain_embedder(workspace):
    from notellm2_ray import Note, NoteEncoder

    (model,) = workspace.glob("embedders/*/model")
    encoder = NoteEncoder.from_pretrained(model)
    vectors = encoder.encode([Note("a", title="A cat in the garden"), Note("b", title="A kitten on the lawn")])
    assert vectors.shape == (2, 64) and not any("lora" in name for name in encoder.model.state_dict())


@pytest.mark.timeout(1800)
def test_a_real_lm_writes_tastes_and_judges_candidates(workspace):
    for verb in ("make-sequences", "summarize-preferences", "run-ranking"):
        notellm2(verb, workspace, *EMBEDDER, *IN_WORDS)
    (table,) = workspace.glob("preferences/*/preferences.parquet")
    tastes = pq.read_table(table)["preference"].to_pylist()
    assert len(set(tastes)) > len(tastes) // 2 and all(len(text) > 20 for text in tastes)
    results = json.loads((workspace / "report" / "ranking" / "results.json").read_text())
    rows = results["protocols"]["uniform"]["rows"]
    assert "tallrec" in {row["method"] for row in rows}
