"""The command line trains, embeds, indexes and compares an embedder and an objective of another package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.pipeline.table import planned
from notellm2_ray.presets import load_settings

TOYS = Path(__file__).parent / "toy_package"
ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "source.num_notes=150",
    "source.num_users=60",
    "embedders.words.model={kind: bag_of_words, embedding_dim: 16, options: {scale: 2.0}}",
    "embedders.words.train={engine: plain, max_steps: 12, batch_pairs: 8, learning_rate: 0.05}",
    "embedders.words.train.objective=pull_together",
    "embedders.untrained.model={kind: bag_of_words}",
    "embedders.untrained.trained=false",
    "embedder=words",
    "evaluate.embedders=[words,untrained]",
    "evaluate.short_tokens=1",
]


@pytest.mark.slow
def test_an_embedder_and_an_objective_of_another_package_are_compared(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{TOYS}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "notellm2_ray.cli", "run-retrieval", "--preset", "demo", f"workspace={tmp_path}"]
    done = subprocess.run([*command, *OVERRIDES], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "report" / "retrieval" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]][:2] == ["words", "untrained"]
    assert "words" in done.stdout
    config = json.loads((tmp_path / "embedders" / "words-seed42" / "model" / "config.json").read_text())
    assert (config["model_type"], config["settings"]["options"]) == ("bag_of_words", {"scale": 2.0})
    assert (tmp_path / "index" / "words-seed42" / "manifest.json").is_file()
    steps = (tmp_path / "embedders" / "words-seed42" / "history.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in steps if "loss" in json.loads(line)]
    assert losses[-1] < losses[0]


def test_an_unknown_kind_gets_a_suggestion(tmp_path):
    settings = load_settings(None, "demo", [f"workspace={tmp_path}", "model.kind=notelm2"])
    with pytest.raises(ConfigError, match=r"unknown kind of embedder 'notelm2'.*did you mean 'notellm2'"):
        list(planned("run-retrieval", settings))
