"""The whole pipeline through the command line, small, like a first run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "--preset",
    "demo",
    *("source.num_notes=240", "source.num_users=150"),
    *("train.batch_pairs=16", "train.max_steps=3", "train.cpus_per_worker=1"),
    *("embed.cpus_per_actor=1", "embed.block_rows=128"),
    *("evaluate.embedders=[notellm2,text_only]", "evaluate.sample_queries=3"),
]


def notellm2(verb: str, workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "notellm2_ray.cli", verb, *SMALL, f"workspace={workspace}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
def test_the_whole_path_writes_a_table_and_a_report_and_is_not_repeated(tmp_path):
    workspace = tmp_path / "world"
    first = notellm2("run-retrieval", workspace)
    assert first.returncode == 0, first.stderr[-3000:]
    for row in ("notellm2", "text_only", "bm25", "popularity", "random"):
        assert f"\n{row} " in first.stdout
    assert str(workspace / "report" / "index.html") in first.stdout
    results = json.loads((workspace / "report" / "retrieval" / "results.json").read_text())
    tested = {(row["method"], row["inputs"]) for row in results["rows"]}
    assert {("notellm2", "multimodal"), ("notellm2", "image"), ("notellm2", "text"), ("text_only", "text")} <= tested
    assert (workspace / "report" / "retrieval" / "index.html").stat().st_size > 10_000

    manifests = sorted(workspace.rglob("manifest.json"))
    written = [path.stat().st_mtime_ns for path in manifests]
    plan = notellm2("run-retrieval", workspace, "--dry-run")
    assert "to do" not in plan.stdout
    second = notellm2("run-retrieval", workspace)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stdout[second.stdout.index("Method") :] == first.stdout[first.stdout.index("Method") :]
    assert [path.stat().st_mtime_ns for path in manifests] == written


def test_a_mistyped_setting_ends_with_one_line_and_no_traceback(tmp_path):
    done = notellm2("run", tmp_path, "train.epoch=3")
    assert done.returncode == 1
    assert "did you mean 'train.epochs'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_out_of_order_says_what_to_run_first(tmp_path):
    done = notellm2("mine-pairs", tmp_path)
    assert done.returncode == 1
    assert "run `notellm2 prepare` first" in done.stderr
    assert "Traceback" not in done.stderr
