"""Training an embedder with LoRA: what is trained, on every engine, wherever it is stopped; what is saved is plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.models.embedder.build import build_encoder
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.lora import is_lora
from notellm2_ray.train.embedder import train_embedder
from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun
from notellm2_ray.train.engine import parameter_groups
from tests.support import embedder_training as material
from tests.support import tiny_models
from tests.support.ranks import run_ranks

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-2}
STEPS = 4


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> Path:
    """The training set, and beside it one whose notes have no image."""
    directory = material.write(tmp_path_factory.mktemp("material"))
    imageless = directory / "imageless"
    imageless.mkdir()
    for name in ("train.parquet", "valid.parquet"):
        (imageless / name).symlink_to(directory / "pairs" / name)
    notes = [note._replace(image=None) for note in material.notes()]
    NoteStore.write(imageless / "train_notes.arrow", [material.as_batch(notes)])
    return directory


def trainer(directory: Path, output: Path, pairs: str = "pairs", model: Any = None, **changes: Any) -> EmbedderRun:
    job = EmbedderJob(
        model=model or material.model_settings(),
        train=material.train_settings(**{"lora": LORA, **changes}),
        seed=1,
        pairs=directory / pairs,
        llm_path=str(directory / "llm"),
        vision_path=str(directory / "clip"),
        output=output,
    )
    run = EmbedderRun(job, torch.device("cpu"), lambda directory, metrics: None)
    run.module.train()
    return run


def steps(run: EmbedderRun, numbers: range = range(STEPS)) -> list[float]:
    losses = []
    for step in numbers:
        torch.manual_seed(step)
        losses.append(run.train(step, run.prepare(step))["loss"])
    return losses


def trained_names(run: EmbedderRun) -> set[str]:
    return {name for name, p in run.encoder.model.named_parameters() if p.requires_grad}


def tensor_names(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_lora_and_fresh_parts_learn_and_nothing_else_does(trained_on, tmp_path):
    run = trainer(trained_on, tmp_path)
    model = run.encoder.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = steps(run, range(12))
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained_names(run)
    assert {name.split(".")[0] for name in changed} == {"llm", "connector", "fusion", "projection", "temperature"}
    assert {name for name in changed if name.startswith("llm.")} == {name for name in before if is_lora(name)}
    assert run.figures()["trained_parameters"] == sum(before[name].numel() for name in changed)


def test_gradient_caching_trains_it_alike(trained_on, tmp_path):
    whole, cached = (steps(trainer(trained_on, tmp_path, cached_notes_per_pass=most)) for most in (None, 3))
    assert cached == pytest.approx(whole, abs=1e-4)
    assert len(set(cached)) == STEPS


def test_lora_has_a_learning_rate_of_its_own(trained_on, tmp_path):
    for own, expected in ((2e-2, 2e-2), (None, 1e-3)):
        run = trainer(trained_on, tmp_path, lora={**LORA, "learning_rate": own}, learning_rate=1e-4)
        names = {id(p): name for name, p in run.encoder.model.named_parameters()}
        rates = {
            names[id(p)]: group["peak"] for group in parameter_groups(run.module, run.settings) for p in group["params"]
        }
        assert rates.keys() == trained_names(run)
        assert {rate for name, rate in rates.items() if is_lora(name)} == {expected}
        assert {rate for name, rate in rates.items() if not is_lora(name)} == {1e-4}


@pytest.mark.parametrize("variant", ["notellm2", "text_only"])
def test_what_is_saved_is_a_plain_embedder_with_the_same_vectors(trained_on, tmp_path, variant):
    run = trainer(trained_on, tmp_path, model=material.model_settings(variant=variant))
    steps(run)
    run.write_weights(tmp_path / "model")
    notes = tiny_models.notes(6, without_image=[2])
    vectors = run.encoder.encode(notes)
    saved = NoteEncoder.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(saved.encode(notes), vectors, atol=1e-5)
    plain = build_encoder(run.job.model, 1, llm_path=str(trained_on / "llm"), vision_path=str(trained_on / "clip"))
    plain.save_pretrained(tmp_path / "plain")
    first, second = (tmp_path / name / "model.safetensors" for name in ("model", "plain"))
    assert tensor_names(first) == tensor_names(second)
    assert first.stat().st_size == second.stat().st_size
    assert np.abs(plain.encode(notes) - vectors).max() > 1e-2


def test_frozen_weights_in_bfloat16_change_no_step(trained_on, tmp_path, monkeypatch):
    lean = trainer(trained_on, tmp_path, precision="bf16")
    frozen = [p for name, p in lean.encoder.model.named_parameters() if ".base_layer." in name]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    losses = steps(lean)
    monkeypatch.setattr("notellm2_ray.models.lora.store_frozen_linears_in_bf16", lambda network: None)
    whole = trainer(trained_on, tmp_path, precision="bf16")
    assert {p.dtype for p in whole.encoder.model.parameters()} == {torch.float32}
    assert steps(whole) == losses


def test_on_a_cpu_the_llm_trains_with_the_attention_whose_backward_pass_is_fast(trained_on, tmp_path, monkeypatch):
    eager = trainer(trained_on, tmp_path / "eager")
    assert eager.encoder.model.llm.config._attn_implementation == "eager"
    losses = steps(eager)
    assert eager.encoder.settings.attention == "sdpa"  # what is saved, and embeds
    monkeypatch.setattr("notellm2_ray.models.llm.attend_eagerly", lambda network: None)
    fused = trainer(trained_on, tmp_path / "fused")
    assert fused.encoder.model.llm.config._attn_implementation == "sdpa"
    assert steps(fused) == pytest.approx(losses, rel=1e-4)


def test_gradient_checkpointing_changes_no_step(trained_on, tmp_path):
    kept, recomputed = (steps(trainer(trained_on, tmp_path, gradient_checkpointing=g)) for g in (False, True))
    assert recomputed == pytest.approx(kept, rel=1e-5)


def test_a_resumed_run_ends_as_the_undisturbed_one(trained_on, tmp_path):
    changes = {"max_steps": 8, "lora": {**LORA, "dropout": 0.2}, "validate_every_steps": 8}
    whole = trainer(trained_on, tmp_path, **changes)
    whole.run()
    checkpoint = whole.files.checkpoint(6)
    weights = {name.partition("/")[2] for name in tensor_names(checkpoint / "state.safetensors")}
    assert weights == trained_names(whole)
    model = whole.files.best(8) / "model.safetensors"
    undisturbed = model.read_bytes()
    model.unlink()
    again = trainer(trained_on, tmp_path, **changes)
    again.resume(checkpoint)
    again.run()
    assert model.read_bytes() == undisturbed


def test_an_embedder_without_an_llm_is_refused_by_name(trained_on, tmp_path):
    with pytest.raises(ConfigError, match=r"model.variant=image_only trains none: set train.lora=null"):
        train_embedder(
            material.model_settings(variant="image_only"),
            material.train_settings(lora=LORA),
            1,
            pairs=trained_on / "pairs",
            llm_path=str(trained_on / "llm"),
            vision_path=str(trained_on / "clip"),
            output=tmp_path,
        )


# --- two ranks, of which the second has no image ---------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "zero0": {"engine": "deepspeed", "zero_stage": 0},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero2": {"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "zero3, lean": {
        "engine": "deepspeed",
        "zero_stage": 3,
        "offload": "parameters_and_optimizer",
        "gradient_checkpointing": True,
    },
    "plain, bf16": {"engine": "plain", "precision": "bf16"},
    "zero2, bf16": {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16"},
    "zero3, bf16": {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"},
}
RESUMED = ("zero1", "zero2", "zero3", "zero2, bf16")


def _trained(directory: Path, scratch: Path, name: str) -> dict[str, Any]:
    from notellm2_ray.train.distributed import rank

    def make() -> EmbedderRun:
        pairs = ("pairs", "imageless")[rank()]
        return trainer(directory, scratch / name, pairs, num_workers=2, **CASES[name])

    run = make()
    losses = steps(run)
    weights = run.engine.state_dict(trained_only=True) or {}
    weights = {key: value.clone() for key, value in weights.items()}
    whole = {key: list(value.shape) for key, value in (run.engine.state_dict() or {}).items()}
    run.write_weights(scratch / name / "model")
    figures = run.validate()
    found = {"losses": losses, "weights": weights, "whole": whole, "valid": figures, "resumed": []}
    if name in RESUMED:
        run.module.train()
        run.engine.save(scratch / name / "state")
        again = make()
        again.engine.load(scratch / name / "state")
        found["resumed"] = [steps(one, range(STEPS, STEPS + 2)) for one in (run, again)]
    return found


def _all_cases(directory: str, scratch: str) -> dict[str, Any]:
    return {name: _trained(Path(directory), Path(scratch), name) for name in CASES}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(trained_on, scratch) -> list[dict[str, Any]]:
    return run_ranks(_all_cases, 2, scratch, str(trained_on), str(scratch))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_engine_trains_lora_alike(two_ranks, trained_on, scratch, tmp_path, name):
    found, plain = two_ranks[0][name], two_ranks[0]["plain, bf16" if "bf16" in name else "plain"]
    assert two_ranks[1][name]["losses"] == found["losses"]
    assert found["losses"] == pytest.approx(plain["losses"], abs=0.05 if "bf16" in name else 1e-4)
    start = trainer(trained_on, tmp_path)
    shapes = {key: value.shape for key, value in start.encoder.model.named_parameters()}
    assert found["weights"].keys() == trained_names(start)
    for key, value in found["weights"].items():
        assert value.shape == shapes[key] and value.dtype == torch.float32
        assert not is_lora(key) or value.abs().max() > 0, key
    assert {key: list(shape) for key, shape in shapes.items()}.items() <= found["whole"].items()
    if "bf16" not in name:
        for key, value in found["weights"].items():
            torch.testing.assert_close(value, plain["weights"][key], atol=2e-4, rtol=1e-3, msg=key)
        assert found["valid"] == pytest.approx(plain["valid"], rel=1e-3)
    notes = tiny_models.notes(6, without_image=[2])
    start.encoder.model.load_state_dict(found["weights"], strict=False)
    saved = NoteEncoder.from_pretrained(scratch / name / "model")
    np.testing.assert_allclose(saved.encode(notes), start.encoder.encode(notes), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_every_engine_resumes_lora_as_if_it_had_not_stopped(two_ranks, name):
    for rank in two_ranks:
        undisturbed, resumed = rank[name]["resumed"]
        assert resumed == undisturbed
