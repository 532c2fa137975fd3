"""Time and memory on a GPU or the CPU."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import torch


def seconds_each(device: torch.device, work: Callable[[int], object], *, warm_up: int = 3, times: int = 10) -> float:
    """Median seconds of ``work(i)``, waiting for the device to finish each."""
    taken = []
    for number in range(warm_up + times):
        wait(device)
        started = time.perf_counter()
        work(number)
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[warm_up:])


def matrix_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a bfloat16 product of random square matrices. (Zeros would run faster than real data.)"""
    draw = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(side, side, generator=draw, device=device, dtype=torch.bfloat16) for _ in ("left", "right")
    )
    out = torch.empty_like(left)
    seconds = seconds_each(device, lambda _: [torch.mm(left, right, out=out) for _ in range(10)]) / 10
    return 2 * side**3 / seconds


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a copy within the device's memory."""
    given = torch.empty(2**31 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).random_()
    out = torch.empty_like(given)
    return 2 * given.numel() / seconds_each(device, lambda _: out.copy_(given))


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """Peak memory of tensors since the reset; on a CPU the peak of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def wait(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
