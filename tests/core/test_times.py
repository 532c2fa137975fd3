"""One rule for times: what a number means, what a text means, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.core.times import EARLIEST, END, read_numbers, read_time

MOMENT = datetime(2024, 6, 1, 12, 30, 59, tzinfo=UTC)


@given(st.integers(EARLIEST // 10**6, END // 10**6 - 1))
def test_no_two_readings_of_a_number_overlap(seconds):
    for factor in (1, 10**3, 10**6, 10**9):
        readings = read_numbers(np.array([seconds * factor]))
        assert (readings.micros[0], readings.fine[0], readings.local[0]) == (seconds * 10**6, True, False)
    time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    for pattern in ("%Y%m%d%H%M%S", "%Y%m%d"):
        readings = read_numbers(np.array([int(time.strftime(pattern))]))
        local = datetime.strptime(time.strftime(pattern), pattern).replace(tzinfo=UTC)
        assert readings.micros[0] == round(local.timestamp()) * 10**6 and readings.local[0]


def test_one_time_in_all_its_shapes():
    shapes = [1_717_245_059, 1_717_245_059_000, "1717245059", 1_717_245_059.0, "2024-06-01T12:30:59Z", MOMENT]
    shapes += [1_717_245_059 * 10**9, "2024-06-01T20:30:59+08:00", MOMENT.astimezone(timezone(timedelta(hours=8)))]
    assert {read_time(shape) for shape in shapes} == {MOMENT}
    for local in (20240601203059, "20240601203059", "2024-06-01 20:30:59", MOMENT.replace(tzinfo=None, hour=20)):
        assert read_time(local, "Asia/Shanghai") == MOMENT
        with pytest.raises(ValueError, match="no time zone"):
            read_time(local)


@pytest.mark.parametrize(
    "value", [0, 12345, -5, 20240631, 2**70, 1e300, float("nan"), True, None, [1], "soon", "0999-01-01Z"]
)
def test_what_is_no_time_is_refused(value):
    with pytest.raises(ValueError):
        read_time(value, "UTC")
