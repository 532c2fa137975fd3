"""What the forecasts of memory compare with: the GPU that is meant, and models whose configuration is at hand."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.settings import Settings

_GIB = 2**30
# Of GPUs that are common, in GiB: T4 or V100; A10, L4 or 4090; A100; A40 or L40S; A100 or H100; H200.
CARDS = (15, 22, 39, 44, 79, 139)
USABLE = 0.92  # the rest is for CUDA itself, NCCL and gaps between blocks


def card_of(settings: Settings) -> float | None:
    """GiB of a GPU: as set, or of this machine's; None: neither."""
    if settings.ray.gpu_memory_gb is not None:
        return settings.ray.gpu_memory_gb
    import torch

    return torch.cuda.get_device_properties(0).total_memory / _GIB if torch.cuda.is_available() else None


def require_at_hand(*names: str) -> None:
    """Raise ModelError at once where a hub that is out of reach would be tried for half a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    far = [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()]
    far = [name for name in far if not isinstance(try_to_load_from_cache(name, "config.json"), str)]
    address = urlparse(constants.ENDPOINT)
    if not far or getproxies():
        return
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
    except OSError:
        raise ModelError(f"the configuration of {far[0]} is neither here nor can the hub be reached") from None


def size_of(size: int) -> str:
    gib = size / _GIB
    return f"{gib:.0f} GiB" if gib >= 100 else f"{gib:.1f} GiB" if gib >= 1 else f"{size / 2**20:.0f} MiB"
