"""Memory that a forward pass frees and the next one needs again."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST = 2**31 - 1

# For a process that is yet to start, as vLLM's; the same as keep_freed_memory(), and large pages, which a running
# process can no longer choose: an engine is 2% quicker with them.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(_LARGEST),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
}


def keep_freed_memory() -> None:
    """Have this process keep what it frees, up to its peak, where the C library is glibc.

    By default glibc returns every large tensor's memory to the system, which hands the next one out zeroed, page by
    page: a forward pass of the demo's embedder over 256 notes took 364,000 page faults and half again as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
