"""Several ranks get the weights that rank 0 loads: the same as if each had loaded them, and nobody else loads any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import embedder_training as material
from tests.support.ranks import run_ranks
from tests.support.tiny_mllm import save_mllm

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "zero2": {"engine": "deepspeed", "zero_stage": 2},
    "zero3": {"engine": "deepspeed", "zero_stage": 3},
    "zero3, offload": {"engine": "deepspeed", "zero_stage": 3, "offload": "parameters_and_optimizer"},
    "zero3, ranker": {"engine": "deepspeed", "zero_stage": 3},
}


def _loaded(directory: str, name: str) -> Any:
    from notellm2_ray.core.settings import TuneSettings
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.models.ranker.model import RankerModel, load_network

    if "ranker" in name:
        return RankerModel(load_network(f"{directory}/mllm", torch.bfloat16), TuneSettings())
    paths = {"llm_path": f"{directory}/llm", "vision_path": f"{directory}/clip"}
    return build_encoder(material.model_settings(), 1, **paths).model


def _shared(directory: str) -> dict[str, Any]:
    from notellm2_ray.core.settings import TrainSettings
    from notellm2_ray.train.distributed import rank
    from notellm2_ray.train.engines import make_engine
    from notellm2_ray.train.one_load import build_once
    from notellm2_ray.train.ranker_run import RankerStep

    def make(name: str) -> Any:
        assert rank() == 0
        return _loaded(directory, name)

    results: dict[str, Any] = {}
    for name, case in CASES.items():
        settings: TrainSettings = material.train_settings(num_workers=2, **case)
        model = build_once(lambda name=name: make(name))
        numbers = sum(one.numel() for one in model.parameters())
        held = sum(one.untyped_storage().nbytes() for one in model.parameters())
        module = RankerStep(model, bf16=False)  # any module around the model does
        engine = make_engine(module, settings, torch.device("cpu"), loaded_once=True)
        whole = engine.state_dict()
        weights = model.state_dict() if name == "plain" else whole or {}
        results[name] = {
            "weights": {key: value.clone() for key, value in weights.items()},
            "held": torch.tensor(held / numbers),
        }
    return results


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = material.write(tmp_path_factory.mktemp("made"))
    save_mllm(directory / "mllm")
    return directory


@pytest.fixture(scope="module")
def two_ranks(made) -> list[dict[str, Any]]:
    return run_ranks(_shared, 2, made, str(made))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_plain_load(made, two_ranks, case):
    expected = dict(_loaded(str(made), case).named_parameters())
    found = two_ranks[0][case]["weights"]
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    if case == "plain":
        assert all(torch.equal(two_ranks[1][case]["weights"][name], value) for name, value in expected.items())


@pytest.mark.slow
def test_other_ranks_hold_no_weights_before_their_engine_asks(two_ranks):
    assert float(two_ranks[0]["plain"]["held"]) == pytest.approx(4)  # bytes a number
    assert float(two_ranks[1]["plain"]["held"]) < 0.1


def test_what_is_pickled_has_structure_and_no_numbers():
    import pickle

    from notellm2_ray.train.one_load import _hollowed

    layer = torch.nn.Linear(300, 200)
    layer.bias.requires_grad_(False)
    network = torch.nn.ModuleDict({"one": layer, "tied": torch.nn.Linear(300, 200)})
    network["tied"].weight = layer.weight
    data = _hollowed({"network": network, "words": ["a"]})
    assert len(data) < 10_000
    made = pickle.loads(data)["network"]
    assert made["tied"].weight is made["one"].weight and made["one"].weight.shape == (200, 300)
    assert made["one"].weight.requires_grad and not made["one"].bias.requires_grad
    assert made["one"].weight.untyped_storage().nbytes() == 4
