"""What messages show of other libraries' errors."""

from __future__ import annotations

import pytest

from notellm2_ray.core.errors import first_line


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("a wrong shape\nand a long story"), "a wrong shape"),
        (RuntimeError("\n  no such file"), "no such file"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_an_error_is_shown_by_its_first_line_or_its_type(error, shown):
    assert first_line(error) == shown
