"""The command line compares multimodal LLMs as embedders: zero-shot and tuned, by text and image or by one of them."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

OVERRIDES = [
    "source.num_notes=150",
    "source.num_users=60",
    "embedders.zero_shot.model={kind: mllm, llm: packaged, embedding_dim: null}",
    "embedders.zero_shot.trained=false",
    "embedders.tuned.model={kind: mllm, llm: packaged, embedding_dim: 16}",
    "embedders.tuned.train={engine: plain, max_steps: 4, batch_pairs: 8}",
    "embedders.llm_zero_shot.model={variant: text_only, embedding_dim: null}",
    "embedders.llm_zero_shot.trained=false",
    "embedder=zero_shot",
    "evaluate.embedders=[zero_shot,tuned,llm_zero_shot]",
    "evaluate.inputs=[multimodal,image,text]",
    "evaluate.short_tokens=1",
]


@pytest.mark.slow
def test_the_papers_rows_of_ready_multimodal_llms(tmp_path):
    command = [sys.executable, "-m", "notellm2_ray.cli", "run-retrieval", "--preset", "demo", f"workspace={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *OVERRIDES], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "report" / "retrieval" / "results.json").read_text())
    rows = [(row["method"], row["inputs"]) for row in results["rows"]]
    for name in ("zero_shot", "tuned"):
        assert {(name, "multimodal"), (name, "image"), (name, "text")} <= set(rows)
    assert ("llm_zero_shot", "text") in rows
    made = json.loads((tmp_path / "embedders" / "zero_shot-seed42" / "model" / "config.json").read_text())
    assert (made["model_type"], made["mllm_config"]["model_type"]) == ("mllm", "qwen2_vl")
    assert not (tmp_path / "tiny").exists()
