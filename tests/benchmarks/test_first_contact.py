"""What is run in the first half hour with a GPU runs here too, as far as it needs PyTorch alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from notellm2_ray.models.embedder.build import count_parameters
from notellm2_ray.models.embedder.mllm_network import network_from_config
from tests.support import ROOT

GPU = Path(ROOT) / "benchmarks" / "gpu"


@pytest.fixture
def contact(monkeypatch):
    """The script as a module; what it imports from beside it is forgotten afterwards."""
    before, threads = set(sys.modules), torch.get_num_threads()
    for path in (GPU.parent, GPU):
        monkeypatch.syspath_prepend(str(path))
    yield importlib.import_module("first_contact")
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(GPU.parent)):
            del sys.modules[name]


@pytest.mark.parametrize("part", ["embedding", "lora", "cached", "mllm"])
def test_a_part_runs_tiny(contact, tmp_path, part):
    contact.run_part(part, True, tmp_path / "records")
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert records and all(one["part"] == part and one["value"] > 0 and one["flops"] > 0 for one in records)


def test_collectives_are_checked_on_one_rank_as_on_one_gpu(contact):
    found = list(importlib.import_module("_contact_torch").collectives(True, ranks=1))
    assert {one.what.partition(",")[0] for one in found} >= {"vectors with gradients", "loss on the CPU", "objects"}
    assert all(one.note == "right" and "1 rank" in one.what for one in found)


def test_a_part_that_lacks_a_library_is_skipped_and_one_that_fails_is_told_of(contact, tmp_path, monkeypatch):
    parts = {
        "card": contact.Part("_contact_torch", ("no_such_library",), 1, "the card"),
        "step": contact.Part("no_such_module", (), 60, "a step"),
    }
    monkeypatch.setattr(contact, "PARTS", parts)
    assert contact.run_apart("card", True, tmp_path / "log")[0]["note"] == "skipped: no_such_library not installed"
    (tmp_path / "part.py").write_text("raise SystemExit('out of memory')")
    monkeypatch.setattr(contact, "__file__", str(tmp_path / "part.py"))
    (failed,) = contact.run_apart("step", True, tmp_path / "log")
    assert failed["note"].startswith("failed: out of memory")


def test_shares_are_of_the_measured_product_and_of_the_makers_rate(contact):
    shape = importlib.import_module("_contact_shapes").Record
    records = [
        {"part": "card", **shape("product", 800, "TFLOP/s", flops=800e12)._asdict()},
        {"part": "step", **shape("3B", 90, "notes/s", flops=400e12, goal=0.45)._asdict()},
        {"part": "lora", **shape("3B", 90, "notes/s", flops=200e12, goal=0.45)._asdict()},
    ]
    card, step, lora = contact.with_shares(records, 989e12)
    assert card["of_product"] == 1 and card["of_nominal"] == pytest.approx(0.809, abs=1e-3)
    assert (step["of_product"], step["held"], lora["of_product"], lora["held"]) == (0.5, True, 0.25, False)
    assert "goal 45%: held" in contact.table([card, step, lora]).splitlines()[2]
    assert contact.with_shares(records, None, on_cpu=True)[1]["held"] is None


def test_networks_for_a_gpu_are_as_large_as_they_are_called(contact):
    shapes, embedder = importlib.import_module("_contact_shapes"), importlib.import_module("embedder")
    for setup, least, most in ((shapes.small(False), 0.6e9, 0.9e9), (shapes.middle(False), 3.0e9, 3.4e9)):
        model = embedder.build(setup, torch.device("meta"))
        assert least < count_parameters(model) < most and setup.device.type == "cuda"
    with torch.device("meta"):
        mllm = network_from_config(shapes.qwen3_vl_2b(False), "sdpa")
    assert 2.0e9 < count_parameters(mllm) < 2.3e9


def test_the_count_of_operations_knows_heads_that_are_wider_than_the_model(contact):
    embedder, flops = importlib.import_module("embedder"), importlib.import_module("_flops")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    llm = Qwen3Config(vocab_size=200, hidden_size=64, intermediate_size=176, num_hidden_layers=2, **heads)
    setup = embedder.tiny_size()._replace(llm=llm)
    counted = flops.count(setup.settings, setup.llm, setup.vision, setup.num_tokens)
    # PyTorch counts whole squares of attention, of which the formula's other half is that of a width of 64, not 128.
    missing = llm.num_hidden_layers * 4 * 64 * setup.num_tokens * (setup.num_tokens - 1) // 2
    ratio = embedder.check_formula(setup, counted._replace(llm=counted.llm + missing))
    assert ratio == pytest.approx(1, abs=0.01)
