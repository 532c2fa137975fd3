"""Preparing batches ahead in threads."""

from __future__ import annotations

import threading
import time

import pytest

from notellm2_ray.core.errors import DataError
from notellm2_ray.train.batches import prefetched


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_keeps_the_order_and_runs_no_further_ahead_than_asked(depth):
    begun: list[int] = []
    lock = threading.Lock()

    def prepare(key: int) -> int:
        with lock:
            begun.append(key)
        time.sleep(0.001 * (key % 3))
        return key * key

    seen = []
    for value in prefetched(prepare, range(12), depth):
        seen.append(value)
        assert len(begun) <= len(seen) + depth
    assert seen == [key * key for key in range(12)]


def test_an_error_while_preparing_arrives_in_its_place():
    def prepare(key: int) -> int:
        if key == 2:
            raise DataError("note n2 has a broken image")
        return key

    values = prefetched(prepare, range(5), 2)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(DataError, match="note n2"):
        next(values)
