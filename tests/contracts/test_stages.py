"""One table of stages: verbs, dry runs, runs and job scripts follow from it, and so does an added row."""

import json
from pathlib import Path

import pytest

from notellm2_ray import cli
from notellm2_ray.pipeline import table
from notellm2_ray.pipeline.stage import Planned, Stage, run_stage, workspace_of

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SCRIPT = '''"""`notellm2 {verb}` as a Ray job.

ray job submit --working-dir . -- python jobs/{name}.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["{verb}", *sys.argv[1:]])
'''


def test_there_is_one_job_script_per_verb_of_the_pipeline():
    verbs = [*cli.pipeline_verbs(), "lift", "swap-embedder"]
    wanted = {verb.replace("-", "_"): SCRIPT.format(verb=verb, name=verb.replace("-", "_")) for verb in verbs}
    assert {path.stem: path.read_text() for path in JOBS.glob("*.py")} == wanted


def planned_count(settings):
    workspace = workspace_of(settings)
    return [Planned("count-notes", workspace.root / "note_count", {}, {"prepared": workspace.prepared})]


def count_notes(settings):
    def work(output):
        import pyarrow.dataset as ds

        count = ds.dataset(workspace_of(settings).notes).count_rows()
        (output / "count.json").write_text(json.dumps(count))
        return {"notes": count}

    (one,) = planned_count(settings)
    return run_stage(one, work)


@pytest.fixture
def with_toy(monkeypatch):
    monkeypatch.setattr(table, "STAGES", list(table.STAGES))
    monkeypatch.setattr(cli, "STAGES", table.STAGES)
    table.add_stage(Stage("count-notes", "count the prepared notes", (), ("prepare",), planned_count, count_notes))


@pytest.mark.slow
def test_a_stage_from_outside_runs_like_the_others(with_toy, tmp_path, capsys, ray_cluster):
    arguments = [f"workspace={tmp_path}", "source.num_notes=40", "source.num_users=10"]
    cli.main(["count-notes", "--dry-run", *arguments])
    assert "to do, after the stages before it" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="run `notellm2 prepare` first"):
        cli.main(["count-notes", *arguments])
    cli.main(["prepare", *arguments])
    cli.main(["count-notes", *arguments])
    assert json.loads((tmp_path / "note_count" / "count.json").read_text()) == pytest.approx(40, abs=3)
    cli.main(["count-notes", "--dry-run", *arguments])
    assert "already there" in capsys.readouterr().out


def test_an_invalid_row_is_refused(with_toy):
    with pytest.raises(ValueError, match="there already is a verb count-notes"):
        table.add_stage(Stage("count-notes", "again", (), (), planned_count, count_notes))
    with pytest.raises(ValueError, match="needs tell-fortunes"):
        table.add_stage(Stage("plot", "plot", (), ("tell-fortunes",), planned_count, count_notes))
