"""Training gives the same whatever the number of ranks, the engine, the groups of notes, and wherever it is stopped."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.train.history import read_history
from tests.support import embedder_training as material
from tests.support.ranks import run_ranks

STEPS = 10


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> Path:
    return material.write(tmp_path_factory.mktemp("material"))


class Trained(NamedTuple):
    """What one process comes to by itself."""

    losses: list[float]
    start: dict[str, torch.Tensor]  # weights
    end: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone(trained_on) -> Callable[[str], Trained]:
    """A function from a precision to the training of one process, each made once."""

    @functools.cache
    def train(precision: str) -> Trained:
        run = material.Run(trained_on, material.train_settings(precision=precision))
        start = {name: value.clone() for name, value in run.engine.state_dict().items()}
        losses = [run.step(step) for step in range(STEPS)]
        return Trained(losses, start, {name: value.clone() for name, value in run.engine.state_dict().items()})

    return train


def test_groups_of_similar_length_change_nothing(trained_on):
    outputs = []
    for chunks in (1, 4):
        run = material.Run(trained_on, material.train_settings(length_chunks=chunks))
        batch = run.sampler[0]
        notes = run.prepare(batch.note_ids)
        assert len(notes.groups) == chunks
        out = run.engine(notes.groups, notes.positions, torch.from_numpy(batch.note_keys))
        out.loss.backward()
        outputs.append((out.loss.detach(), {n: p.grad for n, p in run.module.named_parameters() if p.requires_grad}))
    (loss, gradients), (grouped_loss, grouped) = outputs
    torch.testing.assert_close(loss, grouped_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, grouped[name], atol=1e-5, rtol=1e-3, msg=name)


def test_training_learns_and_gradient_checkpointing_changes_nothing(trained_on, alone):
    losses, start, end = alone("fp32")
    run = material.Run(trained_on, material.train_settings())
    run.module.model.set_gradient_checkpointing(True)
    assert [run.step(step) for step in range(5)] == pytest.approx(losses[:5], rel=1e-4)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(end[name], start[name]) for name in start if name.startswith("tower."))  # frozen


def test_plain_engine_resumes_as_if_it_had_not_stopped(trained_on, tmp_path):
    settings = material.train_settings()
    dropout = material.model_settings(dropout=0.2)
    whole = material.Run(trained_on, settings, dropout)
    losses = [whole.step(step) for step in range(8)]
    stopped = material.Run(trained_on, settings, dropout)
    [stopped.step(step) for step in range(4)]
    stopped.engine.save(tmp_path / "state")
    resumed = material.Run(trained_on, settings, dropout)
    resumed.engine.load(tmp_path / "state")
    assert [resumed.step(step) for step in range(4, 8)] == losses[4:]
    for name, value in whole.engine.state_dict().items():
        assert torch.equal(value, resumed.engine.state_dict()[name]), name


def _trainer(directory: Path, output: Path, *, pairs: Path | None = None, **changes: Any) -> Any:
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun

    job = EmbedderJob(
        model=material.model_settings(),
        train=material.train_settings(**changes),
        seed=1,
        pairs=pairs or directory / "pairs",
        llm_path=str(directory / "llm"),
        vision_path=str(directory / "clip"),
        output=output,
    )
    return EmbedderRun(job, torch.device("cpu"), lambda directory, metrics: None)


def test_without_validation_pairs_the_last_weights_are_kept(trained_on, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for name in ("train_notes.arrow", "train.parquet"):
        (pairs / name).symlink_to(trained_on / "pairs" / name)
    material.write_pairs(pairs / "valid.parquet", np.random.default_rng(0), 0)
    trainer = _trainer(trained_on, tmp_path, pairs=pairs, max_steps=2, logger="tensorboard")
    counts = trainer.run()
    assert counts["best_step"] == counts["steps"] == 2 and counts["best_recall"] is None
    assert (trainer.files.best(2) / "model.safetensors").exists()
    assert [row["step"] for row in read_history(tmp_path / "history.jsonl")] == [1, 2]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_run_with_hard_negatives_and_several_lengths_leaves_a_model_that_knows_its_lengths(trained_on, tmp_path):
    from notellm2_ray.models.embedder.encoder import NoteEncoder

    trainer = _trainer(trained_on, tmp_path, max_steps=2, **HARD)
    batch, notes = trainer.prepare(0)
    assert len(notes.note_ids) == len(batch.note_keys) == 8 * (2 + 2)
    counts = trainer.run()
    found = NoteEncoder.from_pretrained(trainer.files.best(counts["best_step"]))
    assert found.lengths == (16, 4)
    assert found.encode(material.notes()[:2], dimensions=4).shape == (2, 4)


def test_a_checkpoint_in_the_background_counts_once_it_is_written(trained_on, tmp_path, monkeypatch):
    """Training goes on meanwhile; a run that is killed before it is written goes on from an earlier one."""
    from safetensors import torch as files

    from notellm2_ray.train.checkpoints import read_state

    write, release, order = files.save_file, threading.Event(), []

    def slowly(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        if Path(path).name == "state.safetensors":
            release.wait(30)
        write(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", slowly)
    changes = {"max_steps": 8, "checkpoint_every_steps": 3, "background_checkpoints": True}
    trainer = _trainer(trained_on, tmp_path, **changes)
    train, trainer._report = trainer.train, lambda directory, metrics: order.append(f"checkpoint {metrics['step']}")

    def step(number: int, prepared: Any) -> dict[str, Any]:
        order.append(f"step {number + 1}")
        assert not list(tmp_path.rglob("progress.json")) or "checkpoint 3" in order
        if number == 3:
            release.set()
        return train(number, prepared)

    monkeypatch.setattr(trainer, "train", step)
    trainer.run()
    assert order[3:6] == ["step 4", "checkpoint 3", "step 5"]
    assert order[-3:] == ["step 7", "checkpoint 6", "step 8"]
    (tmp_path / "again").mkdir()
    resumed = _trainer(trained_on, tmp_path / "again", **changes)
    resumed.resume(trainer.files.checkpoint(6))
    assert read_state(trainer.files.checkpoint(6)).step == 6
    resumed.run()
    for name, value in trainer.engine.state_dict().items():
        assert torch.equal(value, resumed.engine.state_dict()[name]), name


def test_an_image_that_cannot_be_decoded_names_its_note(trained_on, tmp_path):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for name in ("valid.parquet", "train.parquet"):
        (pairs / name).symlink_to(trained_on / "pairs" / name)
    notes = [note._replace(image=b"no image") if i == 5 else note for i, note in enumerate(material.notes())]
    NoteStore.write(pairs / "train_notes.arrow", [material.as_batch(notes)])
    with pytest.raises(DataError, match="note n5"):
        _trainer(trained_on, tmp_path, pairs=pairs).run()


@pytest.mark.parametrize("notes_per_pass", [None, 5])
def test_a_loss_that_is_not_finite_names_step_and_notes(trained_on, tmp_path, notes_per_pass):
    trainer = _trainer(trained_on, tmp_path, cached_notes_per_pass=notes_per_pass)
    with torch.no_grad():
        trainer.module.model.projection.weight.fill_(math.nan)
    with pytest.raises(ModelError, match=r"step 1: the loss is nan \(the vectors of \d+ notes are not finite: n\d+, n"):
        trainer.run()


def test_learning_rate_and_decay_go_by_group(trained_on):
    from notellm2_ray.train.engine import parameter_groups

    run = material.Run(trained_on, material.train_settings(learning_rate=1e-4, connector_learning_rate=1e-2))
    names = {id(p): name for name, p in run.module.model.named_parameters()}
    found = {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in parameter_groups(run.module, run.settings)
        for p in group["params"]
    }
    assert found["projection.weight"] == (1e-2, run.settings.weight_decay)
    assert found["temperature"] == (1e-4, 0.0)
    assert found["llm.norm.weight"] == (1e-4, 0.0)
    assert found["fusion.gate.bias"] == (1e-2, 0.0)
    assert found["llm.embed_tokens.weight"] == (1e-4, run.settings.weight_decay)
    assert not any(name.startswith("tower.") for name in found)


# --- two ranks ------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "zero0": {"engine": "deepspeed", "zero_stage": 0},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "zero3, offload": {"engine": "deepspeed", "zero_stage": 3, "offload": "parameters_and_optimizer"},
    "plain, bf16": {"engine": "plain", "precision": "bf16"},
    "zero1, bf16": {"engine": "deepspeed", "zero_stage": 1, "precision": "bf16"},
    "zero2, bf16": {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16"},
    "zero3, bf16": {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"},
}
HARD = {"hard_negatives": 2, "dimensions": (16, 4)}
RESUMED = ("zero1", "zero2", "zero3")


def _gathered_gradient() -> dict[str, torch.Tensor]:
    from notellm2_ray.train.distributed import gather_rows, rank

    rows = (torch.arange(6.0).reshape(3, 2) + 10 * rank()).requires_grad_()
    everybody, first = gather_rows(rows)
    weights = torch.arange(12.0).reshape(6, 2) * (rank() + 1)
    (everybody * weights).sum().backward()
    flags, _ = gather_rows(torch.tensor([rank() == 0, True, False]))
    return {"rows": everybody.detach(), "first": torch.tensor(first), "gradient": rows.grad, "flags": flags}


def _one_step_gradients(directory: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first step, as the plain engine averages them."""
    run = material.Run(Path(directory), material.train_settings(num_workers=2, **changes))
    run.forward(0).loss.backward()
    return {name: p.grad.clone() for name, p in run.module.named_parameters() if p.requires_grad}


def _trained(directory: str, case: dict[str, Any]) -> dict[str, Any]:
    run = material.Run(Path(directory), material.train_settings(num_workers=2, **case))
    losses = [run.step(step) for step in range(STEPS)]
    weights = run.engine.state_dict() or {}
    return {"losses": losses, "weights": {name: value.clone() for name, value in weights.items()}}


def _resumed(directory: str, case: dict[str, Any], state: str) -> list[list[float]]:
    settings = material.train_settings(num_workers=2, background_checkpoints=True, **case)
    dropout = material.model_settings(dropout=0.2)
    whole = material.Run(Path(directory), settings, dropout)
    losses = [whole.step(step) for step in range(3)]
    whole.engine.save(Path(state))
    losses += [whole.step(step) for step in range(3, 6)]
    whole.engine.finish_save()
    torch.distributed.barrier()
    again = material.Run(Path(directory), settings, dropout)
    again.engine.load(Path(state))
    return [losses[3:], [again.step(step) for step in range(3, 6)]]


def _score(directory: str, case: dict[str, Any], num_workers: int) -> list[float]:
    """Validation before any step, in batches of two notes a rank, one of which may be all without an image."""
    from notellm2_ray.train.sampler import Pairs
    from notellm2_ray.train.validation import Validation

    run = material.Run(Path(directory), material.train_settings(num_workers=num_workers, **case))
    valid = Pairs(Path(directory) / "pairs" / "valid.parquet")
    validation = Validation(valid, run.prepare, max_pairs=9, batch_pairs=num_workers, loss=run.loss, seed=1, prefetch=1)
    return [*validation.score(run.module, torch.device("cpu")), len(validation)]


def _all_cases(directory: str, scratch: str) -> dict[str, Any]:
    return {
        "gather": _gathered_gradient(),
        "gradients": _one_step_gradients(directory),
        "hard": _one_step_gradients(directory, **HARD),
        "trained": {name: _trained(directory, case) for name, case in CASES.items()},
        "scores": [_score(directory, CASES[name], 2) for name in ("plain", "zero3")],
        "resumed": {name: _resumed(directory, CASES[name], f"{scratch}/{name}") for name in RESUMED},
    }


@pytest.fixture(scope="module")
def two_ranks(trained_on, tmp_path_factory) -> list[dict[str, Any]]:
    """Everything that needs two processes, in one start of them."""
    scratch = tmp_path_factory.mktemp("ranks")
    return run_ranks(_all_cases, 2, scratch, str(trained_on), str(scratch))


@pytest.mark.slow
def test_gathered_rows_get_the_sum_of_all_ranks_gradients(two_ranks):
    weights = torch.arange(12.0).reshape(6, 2)
    for rank, result in enumerate(two_ranks):
        gathered = result["gather"]
        assert torch.equal(gathered["rows"][3:], gathered["rows"][:3] + 10)
        assert gathered["first"] == 3 * rank
        assert torch.equal(gathered["gradient"], 3 * weights[3 * rank : 3 * rank + 3])  # weights of 1 and of 2
        assert gathered["flags"].tolist() == [True, True, False, False, True, False]


@pytest.mark.slow
def test_two_ranks_of_four_pairs_are_one_of_eight(two_ranks, trained_on):
    for found, changes in (("gradients", {}), ("hard", HARD)):
        run = material.Run(trained_on, material.train_settings(**changes))
        loss = run.forward(0).loss
        loss.backward()
        if not changes:
            assert two_ranks[0]["trained"]["plain"]["losses"][0] == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in run.module.named_parameters():
            if parameter.requires_grad:
                # A vector cut to four numbers is short, so that gradients through its length round by more.
                atol = 1e-6 if not changes else 1e-6 + 1e-3 * float(parameter.grad.abs().max())
                for rank in two_ranks:
                    torch.testing.assert_close(rank[found][name], parameter.grad, atol=atol, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_engine_trains_alike(two_ranks, alone, case):
    losses, start, weights = alone(CASES[case].get("precision", "fp32"))
    trained = two_ranks[0]["trained"][case]
    assert two_ranks[1]["trained"][case]["losses"] == trained["losses"]
    bf16 = "bf16" in case
    assert trained["losses"] == pytest.approx(losses, abs=0.05 if bf16 else 1e-4)
    # How far apart the weights end, as a share of how far they went.
    apart = sum(float((trained["weights"][name] - weights[name]).square().sum()) for name in weights)
    moved = sum(float((start[name] - weights[name]).square().sum()) for name in weights)
    assert (apart / moved) ** 0.5 < (0.1 if bf16 else 1e-4)


@pytest.mark.slow
def test_ranks_share_a_validation(two_ranks, trained_on):
    plain, sharded = two_ranks[0]["scores"]
    assert two_ranks[1]["scores"] == [plain, sharded]
    assert plain[2] == 9
    assert sharded == pytest.approx(plain, rel=1e-5)
    assert plain[0] == _score(str(trained_on), CASES["plain"], 1)[0]  # the recall does not depend on batches


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_engines_resume_as_if_they_had_not_stopped(two_ranks, case):
    for rank in two_ranks:
        undisturbed, resumed = rank["resumed"][case]
        assert resumed == undisturbed
