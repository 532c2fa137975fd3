"""Fixtures shared by all tests: one embedded Ray for the whole run, and the real data where it is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def ray_cluster():
    """The one embedded Ray cluster of this test run."""
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.core.settings import RaySettings

    ray = connect(RaySettings(num_cpus=4, object_store_gb=0.5))
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED_DATA}")
    return SHARED_DATA
