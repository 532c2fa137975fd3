"""Tuning the ranker: it learns, every engine does the same, and stopping changes nothing."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.settings import RankerSettings, TuneSettings
from notellm2_ray.train.history import read_history
from notellm2_ray.train.ranker import train_ranker
from notellm2_ray.train.ranker_data import (
    RankerFiles,
    RankerRows,
    check_rows,
    gather_notes,
    length_groups,
    split_groups,
    validation_plan,
)
from notellm2_ray.train.ranker_run import RankerJob, RankerRun, pooled_auc, train_settings
from tests.support import architectures
from tests.support import ranker_training as material
from tests.support.ranks import run_ranks

STEPS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return material.write(tmp_path_factory.mktemp("material"))


def _files(directory: Path, output: Path, variant: str = "mllm_msr") -> RankerFiles:
    preferences = None if variant == "tallrec" else directory / "preferences.parquet"
    files = RankerFiles(directory / "sequences", preferences, output / "ray_train" / "notes.arrow")
    gather_notes(files, directory / "notes", material.ranker_settings(variant=variant))
    return files


def _trainer(directory: Path, output: Path, variant: str = "mllm_msr", **changes: Any) -> RankerRun:
    ranker, tune = material.ranker_settings(variant=variant), material.tune_settings(**changes)
    job = RankerJob(ranker, tune, str(directory / "mllm"), _files(directory, output, variant), output)
    trainer = RankerRun(job, torch.device("cpu"), lambda directory, metrics: None)
    trainer.module.train()
    return trainer


def _steps(trainer: RankerRun, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        losses.append(trainer.train(step, trainer.prepare(step))["loss"])
    return losses


def test_groups_are_of_similar_length_and_keep_to_the_limit():
    lengths = [10, 50, 11, 12, 49]
    groups = length_groups(lengths, 100)
    assert groups == [[0, 2, 3], [4, 1]]
    assert length_groups(lengths, 5) == [[0], [2], [3], [4], [1]]
    assert len(split_groups(groups, 4)) == 4
    assert split_groups(groups, 5) == [[0], [2], [3], [4], [1]]


def test_auc_counts_ties_half():
    assert pooled_auc(np.array([0.9, 0.1, 0.5, 0.5]), np.array([True, False, True, False])) == 0.875
    assert pooled_auc(np.array([0.9]), np.array([True])) == 0.5


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="multiple of tune.num_workers"):
        TuneSettings(batch_size=3, num_workers=2)
    assert train_settings(TuneSettings(engine="plain", zero_stage=2)).engine == "plain"


def test_candidates_without_a_note_are_quarantined_and_too_few_refused(directory, tmp_path):
    broken = material.write(tmp_path / "broken", missing=("n0", "n1"))
    files, ranker = _files(broken, tmp_path), material.ranker_settings()
    counts = check_rows(files, ranker, material.tune_settings(), tmp_path)
    rows = pq.read_table(tmp_path / "quarantine" / "candidates.parquet").to_pylist()
    assert counts["quarantined"] == len(rows) > 0
    assert {row["reason"] for row in rows} <= {"there is no note 'n0'", "there is no note 'n1'"}
    assert counts["prompts"] == 16 - sum("train.parquet" in row["source"] for row in rows)
    with pytest.raises(DataError, match="do not fill one batch of tune.batch_size=64"):
        check_rows(files, ranker, material.tune_settings(batch_size=64), tmp_path)


def _valid_split(num_examples: int, num_negatives: int) -> RankerRows:
    rows = object.__new__(RankerRows)
    labels = np.tile([True] + [False] * num_negatives, num_examples)
    rows.candidates = SimpleNamespace(example_of=np.repeat(np.arange(num_examples), 1 + num_negatives), labels=labels)
    rows._places = np.arange(len(labels))
    return rows


@pytest.mark.parametrize(
    ("changes", "total", "every", "targets", "prompts"),
    [
        ({}, 300, 100, 200, 400),  # a quarter of two units of work for each of 800 prompts
        ({}, 25_000, 1250, 200, 4200),  # twenty times, on all candidates
        ({"validation_share": 5}, 300, 100, 200, 4200),
        ({"validation_share": 0.1}, 300, 100, 80, 160),
        ({"validate_every_steps": 1, "batch_size": 1}, 300, 1, 1, 2),  # at least one target and one negative
    ],
)
def test_validations_take_a_bounded_share_of_the_work(changes, total, every, targets, prompts):
    valid = _valid_split(300, 20)
    plan = validation_plan(TuneSettings(**changes), total, valid)
    assert (plan.every_steps, len(plan.rows), valid.labels[plan.rows].sum()) == (every, prompts, targets)
    shown = valid.candidates.example_of[plan.rows]
    assert set(np.bincount(shown)[np.unique(shown)]) == {prompts // targets}
    assert np.array_equal(plan.rows, validation_plan(TuneSettings(**changes), total, valid).rows)


def test_a_step_is_the_same_in_one_group_and_in_many(directory, tmp_path):
    whole = _steps(_trainer(directory, tmp_path, max_batch_tokens=100_000), range(3))
    parts = _steps(_trainer(directory, tmp_path, max_batch_tokens=64), range(3))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_plain_engine_resumes_as_if_it_had_not_stopped(directory, tmp_path):
    changes = {"lora_dropout": 0.2}
    whole = _trainer(directory, tmp_path, **changes)
    _steps(whole, range(2))
    whole.engine.save(tmp_path / "state")
    expected = _steps(whole, range(2, 4))
    again = _trainer(directory, tmp_path, **changes)
    again.engine.load(tmp_path / "state")
    assert _steps(again, range(2, 4)) == expected


def test_a_loss_that_is_not_finite_stops_the_run(directory, tmp_path):
    trainer = _trainer(directory, tmp_path)
    with torch.no_grad():
        next(p for p in trainer.ranker.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ModelError, match=r"step 1: the loss is nan at 4 prompt\(s\): .*Lower tune.learning_rate"):
        _steps(trainer, range(1))


def test_a_prompt_whose_loss_is_not_finite_is_named(directory, tmp_path):
    trainer = _trainer(directory, tmp_path, max_batch_tokens=64)
    rows, features = trainer.prepare(0)
    with_image = next(place for place, item in enumerate(features) if item.vision)
    pixels = {name: torch.full_like(values, torch.nan) if values.is_floating_point() else values
              for name, values in features[with_image].vision.items()}  # fmt: skip
    features[with_image] = features[with_image]._replace(vision=pixels)
    candidate, _ = trainer._rows.question(int(rows[with_image]))
    named = f"at 1 prompt(s): note {candidate.note_id} of example {candidate.example_id}."
    with pytest.raises(ModelError, match=re.escape(named)):
        trainer.train(0, (rows, features))


def test_every_loss_and_variant_trains(directory, tmp_path):
    for changes in ({"loss_on": "everything"}, {"variant": "tallrec"}, {"gradient_checkpointing": True}):
        losses = _steps(_trainer(directory, tmp_path / str(len(changes)) / next(iter(changes)), **changes), range(1))
        assert np.isfinite(losses).all()


# --- two ranks ------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "zero2, bf16": {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16"},
    "zero3, bf16": {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"},
}


def _trained(directory: str, scratch: str, name: str) -> dict[str, Any]:
    # So few tokens per group that some groups have no image, and that ranks differ in their number of groups.
    changes = {"num_workers": 2, "max_batch_tokens": 140, **CASES[name]}
    output = Path(scratch) / f"rank{torch.distributed.get_rank()}" / name
    trainer = _trainer(Path(directory), output, **changes)
    losses = _steps(trainer, range(STEPS))
    trainer.engine.save(Path(scratch) / "states" / name)
    weights = {key: value.clone() for key, value in (trainer.engine.state_dict(trained_only=True) or {}).items()}
    figures = trainer.validate()
    losses += _steps(trainer, range(STEPS, STEPS + 2))
    again = _trainer(Path(directory), output, **changes)
    again.engine.load(Path(scratch) / "states" / name)
    resumed = _steps(again, range(STEPS, STEPS + 2))
    return {"losses": losses, "resumed": resumed, "valid": figures, "weights": weights}


def _all_cases(directory: str, scratch: str) -> dict[str, Any]:
    return {name: _trained(directory, scratch, name) for name in CASES}


@pytest.fixture(scope="module")
def two_ranks(directory, tmp_path_factory) -> list[dict[str, Any]]:
    scratch = tmp_path_factory.mktemp("ranks")
    return run_ranks(_all_cases, 2, scratch, str(directory), str(scratch))


class Tuned(NamedTuple):
    """What one process comes to by itself."""

    losses: list[float]
    start: dict[str, torch.Tensor]  # weights
    end: dict[str, torch.Tensor]
    valid: dict[str, float]


@pytest.fixture(scope="module")
def alone(directory, tmp_path_factory) -> Callable[[str], Tuned]:
    """A function from a precision to the tuning of one process, each made once."""

    @functools.cache
    def tune(precision: str) -> Tuned:
        trainer = _trainer(directory, tmp_path_factory.mktemp("alone"), precision=precision)
        start = {key: value.clone() for key, value in trainer.engine.state_dict(trained_only=True).items()}
        losses = _steps(trainer, range(STEPS))
        return Tuned(losses, start, trainer.engine.state_dict(trained_only=True), trainer.validate())

    return tune


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_engine_tunes_alike(two_ranks, alone, name):
    bf16 = "bf16" in name
    losses, start, weights, valid = alone("bf16" if bf16 else "fp32")
    found = two_ranks[0][name]
    assert two_ranks[1][name]["losses"] == found["losses"]
    assert found["losses"][:STEPS] == pytest.approx(losses, rel=0.05 if bf16 else 1e-3)
    apart = sum(float((found["weights"][key] - weights[key]).square().sum()) for key in weights)
    moved = sum(float((start[key] - weights[key]).square().sum()) for key in weights)
    assert (apart / moved) ** 0.5 < (0.5 if bf16 else 0.01)
    if not bf16:
        assert found["valid"] == pytest.approx(valid, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_engine_resumes_as_if_it_had_not_stopped(two_ranks, name):
    for rank in two_ranks:
        assert rank[name]["resumed"] == rank[name]["losses"][STEPS:]


# --- through Ray Train ----------------------------------------------------------------------------------------------


def _run(directory: Path, output: Path, **changes: Any) -> dict[str, Any]:
    output.mkdir(exist_ok=True)
    settings = {"engine": "deepspeed", "zero_stage": 2, "num_workers": 2, "epochs": 8, "lora_dropout": 0.1, **changes}
    return train_ranker(
        material.ranker_settings(),
        material.tune_settings(**settings),
        model_path=str(directory / "mllm"),
        sequences=directory / "sequences",
        notes=directory / "notes",
        preferences=directory / "preferences.parquet",
        output=output,
    )


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, directory, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed")
    return output, _run(directory, output)


@pytest.mark.slow
def test_a_run_leaves_an_adapter_a_model_and_its_history(undisturbed, directory):
    from notellm2_ray.models.ranker.model import load_network

    output, counts = undisturbed
    assert {path.name for path in output.iterdir()} == {"adapter", "model", "history.jsonl", "training.json"}
    rows = read_history(output / "history.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == counts["steps"] == 8 * (16 // 4)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    validations = {row["step"]: row["valid_auc"] for row in rows if "valid_auc" in row}
    assert counts["best_auc"] == validations[counts["best_step"]] == max(validations.values())
    assert counts["prompts"] == 16 and counts["validation_prompts"] == 4 and counts["without_preference"] == 0
    assert counts["validation_examples"] == 2 and counts["validate_every_steps"] == 5
    tuned, base = load_network(str(output / "model")), load_network(str(directory / "mllm"))
    same = {name: torch.equal(value, base.state_dict()[name]) for name, value in tuned.state_dict().items()}
    assert all(equal for name, equal in same.items() if "visual" in name or "embed" in name)
    assert not any(equal for name, equal in same.items() if "q_proj.weight" in name and "language_model" in name)
    assert _run(directory, output) == counts  # a finished run is not run again


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(undisturbed, directory, tmp_path):
    from tests.train.test_launch import _when_step, _workers_of

    def kill() -> None:
        _workers_of(os.getpid())[-1].send_signal(signal.SIGKILL)

    thread = _when_step(tmp_path, 13, kill)
    _run(directory, tmp_path, readers=1)  # nor does a process that reads
    thread.join()
    rows, expected = read_history(tmp_path / "history.jsonl"), read_history(undisturbed[0] / "history.jsonl")
    for row in (*rows, *expected):
        row.pop("prompts_per_s", None)
    assert rows == expected
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (undisturbed[0] / name).read_bytes()
    assert psutil.pid_exists(os.getpid())


@pytest.mark.slow
def test_a_cluster_that_is_too_small_is_refused(ray_cluster, directory, tmp_path):
    with pytest.raises(ConfigError, match=r"needs 1000 CPUs.*tune.cpus_per_worker"):
        _run(directory, tmp_path, cpus_per_worker=500)


def test_a_model_whose_prompts_cannot_fit_is_refused_before_anything_starts(directory, tmp_path):
    model = architectures.save("llava_next", tmp_path / "model", published=True, weights=False)
    tables = {"sequences": directory / "sequences", "notes": directory / "notes", "preferences": None}
    with pytest.raises(ConfigError, match=r"2,928 of them for an image of .*generation\.max_model_len=2048"):
        train_ranker(RankerSettings(), TuneSettings(), model_path=model, output=tmp_path, max_model_len=2048, **tables)
