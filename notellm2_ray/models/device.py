"""What a device can do, and what follows from it where the settings leave it open."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices natively; elsewhere bfloat16 saves memory but no time."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def inference_precision(given: str, device: torch.device | str) -> str:
    """The precision in which an embedder runs: ``given``, and for ``auto`` what suits the device.

    That is ``bf16`` on a GPU that multiplies it natively, and ``fp32`` elsewhere.
    """
    if given != "auto":
        return given
    return "bf16" if torch.device(device).type == "cuda" and multiplies_bf16(device) else "fp32"


def allow_tf32(precision: str, device: torch.device | str) -> None:
    """With ``tf32``, let this process multiply float32 matrices on a GPU in TF32: 10 bits of mantissa instead of 23.

    torch has one switch for the whole process. It stays as it is for other precisions, and without a GPU.
    """
    if precision == "tf32" and torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
