"""The forecast of a training's memory, against DeepSpeed's own estimators and against tensors that really live."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.models.footprint import Footprint
from notellm2_ray.train.memory import Load, training_memory
from tests.support import embedder_training as material
from tests.support.ranks import run_ranks

SEVEN = Footprint(7_291_322_881, 7_205_524_993, 343_191_552, 13_151_672_320, 1_227_163_496, 104_142_952, 38_348_860)
NOTES = Load(32, 8)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"num_workers": 8, "gpus_per_worker": 1, **changes})


def states(memory):
    return sum(memory.device.get(name, 0) for name in ("weights", "master copies", "gradients", "optimizer moments"))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_states_are_deepspeed_s_estimate_with_weights_and_gradients_in_32_bits(ranks):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    trained = SEVEN.trained
    sizes = SEVEN._replace(frozen=0)
    _, theirs = estimate_zero2_model_states_mem_needs(trained, ranks, 1, cpu_offload=False)
    ours = states(training_memory(sizes, settings(num_workers=ranks, zero_stage=2), NOTES))
    assert ours == pytest.approx(theirs + 2 * trained - 2 * trained / ranks, rel=1e-6)

    _, theirs, layer = estimate_zero3_model_states_mem_needs(trained, 0, ranks, 1, cpu_offload=False)
    ours = states(training_memory(sizes, settings(num_workers=ranks), NOTES))
    assert layer == 0 and ours == pytest.approx(theirs + 2 * trained / ranks, rel=1e-6)

    host, device, _ = estimate_zero3_model_states_mem_needs(trained, 0, ranks, 1)
    offloaded = training_memory(sizes, settings(num_workers=ranks, offload="parameters_and_optimizer"), NOTES)
    assert states(offloaded) == device == 0
    # Theirs is 18 bytes a number and half as much again for buffers, for all ranks together.
    assert ranks * sum(offloaded.host.values()) == pytest.approx(host * 24 / 27, rel=1e-6)


def test_seven_billion_parameters_over_eight_gpus_need_no_offload():
    sharded = training_memory(SEVEN, settings(gradient_checkpointing=True), NOTES)
    assert 15e9 < states(sharded) < 20e9 and sharded.peak < 0.92 * 39 * 2**30
    assert not sharded.host
    alone = training_memory(SEVEN, settings(num_workers=1, engine="plain"), NOTES)
    assert states(alone) > 115e9 and alone.peak > 0.92 * 139 * 2**30


def test_what_needs_less_is_foretold_less():
    peaks = [
        training_memory(SEVEN, settings(**changes), load).peak
        for changes, load in (
            ({"engine": "plain"}, NOTES),
            ({"zero_stage": 2}, NOTES),
            ({"zero_stage": 3}, NOTES),
            ({"zero_stage": 3}, Load(4, 4, accumulates=True)),
            ({"zero_stage": 3, "offload": "optimizer"}, Load(4, 4, accumulates=True)),
        )
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "zero2, bf16": {"engine": "deepspeed", "zero_stage": 2, "precision": "bf16"},
    "zero3, bf16": {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"},
}
AFTER = ("weights", "master copies", "optimizer moments", "buffers")


def _live(without: set[int]) -> dict[int, int]:
    gc.collect()
    found = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return {one._cdata: one.nbytes() for one in found if one._cdata not in without}


def _measured(directory: str) -> dict[str, Any]:
    """Bytes of all tensors after two steps, of one rank of two."""
    results = {}
    for name, case in CASES.items():
        before = set(_live(set()))
        run = material.Run(Path(directory), material.train_settings(num_workers=2, **case))
        for step in range(2):
            run.step(step)
        results[name] = torch.tensor(sum(_live(before).values()))
        del run
    return results


@pytest.mark.slow
def test_what_lives_after_a_step_was_foretold(tmp_path):
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.train.engine import num_trained

    material.write(tmp_path)
    paths = {"llm_path": str(tmp_path / "llm"), "vision_path": str(tmp_path / "clip")}
    model = build_encoder(material.model_settings(), 1, **paths).model
    parameters, trained = sum(one.numel() for one in model.parameters()), num_trained(model)
    sizes = Footprint(parameters, trained, 4 * (parameters - trained), 0, 0, 0, 0)
    found = run_ranks(_measured, 2, tmp_path, str(tmp_path))
    for name, case in CASES.items():
        memory = training_memory(sizes, material.train_settings(num_workers=2, **case), Load(0, 0))
        # Between steps only DDP and ZeRO-3 hold gradients.
        kept = AFTER if name.startswith("zero2") else (*AFTER, "gradients")
        assert found[0][name] == pytest.approx(sum(memory.device.get(part, 0) for part in kept), rel=0.15), name
