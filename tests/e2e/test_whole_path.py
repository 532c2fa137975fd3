"""The whole pipeline through the command line, small, like a first run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# As in `make demo`, with one embedder instead of two.
DEMO = ["--preset", "demo", "evaluate.embedders=[notellm2]", "evaluate.sample_queries=3"]
README = Path(__file__).resolve().parents[2] / "README.md"
SPREAD = 4.0  # percentage points; docs/results.md says how far seeds and processors are apart


def notellm2(verb: str, workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "notellm2_ray.cli", verb, *DEMO, f"workspace={workspace}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def shown_in_readme() -> dict[str, tuple[float, float]]:
    """R@10 and R@100 of all pairs of each row of the README's table."""
    rows = re.findall(r"^(\w+) +(?:multimodal|text|image|-) +([\d.]+)\S* +([\d.]+)", README.read_text(), re.MULTILINE)
    return {name: (float(ten), float(hundred)) for name, ten, hundred in rows}


@pytest.mark.slow
@pytest.mark.alone
def test_the_whole_path_gives_the_readmes_table_and_a_report_and_is_not_repeated(tmp_path):
    workspace = tmp_path / "world"
    first = notellm2("run-retrieval", workspace)
    assert first.returncode == 0, first.stderr[-3000:]
    assert str(workspace / "report" / "index.html") in first.stdout
    results = json.loads((workspace / "report" / "retrieval" / "results.json").read_text())
    rows = {(row["method"], row["inputs"]): row["recall"]["all"] for row in results["rows"]}
    assert {("notellm2", "multimodal"), ("notellm2", "image"), ("notellm2", "text")} <= rows.keys()
    expected = shown_in_readme()
    for name, inputs, allowed in (
        ("bm25", "text", 0.01),
        ("popularity", "-", 0.01),
        ("notellm2", "multimodal", SPREAD),
    ):
        found = [100 * rows[name, inputs][k]["mean"] for k in ("10", "100")]
        assert found == pytest.approx(expected[name], abs=allowed), name
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
