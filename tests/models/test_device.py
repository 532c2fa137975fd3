"""Which precision follows from which device, on devices that are not here."""

from __future__ import annotations

import pytest
import torch

from notellm2_ray.models.device import allow_tf32, inference_precision


@pytest.mark.parametrize(
    ("given", "device", "native", "expected"),
    [
        ("auto", "cpu", True, "fp32"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),  # a T4 or V100 emulates it
        ("fp32", "cuda", True, "fp32"),
        ("bf16", "cuda", False, "bf16"),
        ("tf32", "cuda", True, "tf32"),
    ],
)
def test_precision_follows_the_device_unless_set(monkeypatch, given, device, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert inference_precision(given, device) == expected


def test_tf32_is_used_where_it_is_asked_for_and_there_is_a_gpu():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for precision, device in (("fp32", "cuda"), ("bf16", "cuda"), ("tf32", "cpu")):
            allow_tf32(precision, device)
            assert torch.get_float32_matmul_precision() == "highest"
        allow_tf32("tf32", "cuda")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
