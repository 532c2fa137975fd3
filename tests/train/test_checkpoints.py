"""The files of a run while it trains: states, errors, and what it becomes in the end."""

from __future__ import annotations

import json

import pytest

from notellm2_ray.core.errors import ModelError
from notellm2_ray.train.checkpoints import RunFiles, RunState, publish, read_state, write_state


def test_an_error_of_a_rank_reaches_the_driver_as_it_was(tmp_path):
    files = RunFiles(tmp_path)
    assert files.read_error() is None
    files.write_error(ModelError("step 3: the loss is nan"))
    error = files.read_error()
    assert type(error) is ModelError and str(error) == "step 3: the loss is nan"
    files.forget_error()
    assert files.read_error() is None


def _checkpoint(files: RunFiles, step: int) -> None:
    files.checkpoint(step).mkdir(parents=True)
    write_state(files.checkpoint(step), RunState(step=step))


def _snapshot(files: RunFiles, text: str) -> None:
    (files.root / "run" / "checkpoint_manager_snapshot.json").write_text(text)


def test_a_damaged_snapshot_costs_no_checkpoint(tmp_path):
    files = RunFiles(tmp_path)
    _checkpoint(files, 10)
    _checkpoint(files, 20)
    files.checkpoint(30).mkdir()  # killed while it was written
    _snapshot(files, '{"checkpoint_results": [{"che')
    resume_from = files.repair_snapshot()
    assert resume_from == files.checkpoint(20)
    assert read_state(resume_from).step == 20
    assert not list((files.root / "run").glob("*.json"))


def test_checkpoints_that_ray_does_not_know_are_removed(tmp_path):
    files = RunFiles(tmp_path)
    _checkpoint(files, 10)
    _checkpoint(files, 20)
    _snapshot(files, json.dumps({"checkpoint_results": [{"checkpoint_dir_name": files.checkpoint(10).name}]}))
    assert files.repair_snapshot() is None
    assert files.checkpoint(10).exists() and not files.checkpoint(20).exists()


@pytest.mark.parametrize("killed_after", ["nothing", "result", "model"])
def test_publishing_can_be_repeated(tmp_path, killed_after):
    files = RunFiles(tmp_path)
    files.best(7).mkdir(parents=True)
    (files.best(7) / "config.json").write_text("{}")
    result = {"steps": 9, "best_step": 7}
    if killed_after != "nothing":
        files.result.write_text(json.dumps(result))
    if killed_after == "model":
        files.best(7).rename(files.model)
    assert publish(files, result if killed_after == "nothing" else {}) == result
    assert (files.model / "config.json").exists() and not files.root.exists()
    assert publish(files, {}) == result
