"""The small service of the tests, for the benchmarks: this puts the checkout on the path, wherever a script is run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support import engines
from tests.support.serving import SMALL, START, Service, free_port, make_world, wait_for

__all__ = ["SMALL", "START", "Service", "engines", "free_port", "make_world", "wait_for"]
