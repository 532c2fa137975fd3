"""A process keeps the memory that it frees."""

import ctypes
import subprocess
import sys

import pytest

from notellm2_ray.core import memory

# Page faults while 40 MB, more than glibc keeps by itself, are allocated, written and freed twenty times.
FAULTS = """
import resource, sys
from notellm2_ray.core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def use(size):
    return b"x" * size
use(40_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use(40_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_is_freed_is_used_again():
    def faults(how: str, environment: dict[str, str] | None = None) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert 4 * faults("keep") < faults("as it is")
    assert 4 * faults("as it is", dict(memory.ENVIRONMENT)) < faults("as it is")
