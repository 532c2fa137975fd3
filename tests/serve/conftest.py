"""One world for all tests of the service, and one running application for a module that asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """See :class:`serving.World`."""
    from serving import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[object]:
    """A function from a plan to a :class:`serving.Service` that runs it; all are stopped with the module."""
    from serving import Service

    services: list[Service] = []

    def start(plan):
        services.append(Service(plan, tmp_path_factory.mktemp("service")))
        return services[-1]

    yield start
    for service in services:
        service.stop()
