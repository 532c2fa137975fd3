"""Rows by name: each name once, in order, and a mistyped name gets the nearest."""

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.registry import Registry


@pytest.fixture
def registry():
    return Registry("row", "notellm2_ray.no_such_group", {"first": "os.path:sep", "second": "os.path:curdir"})


def test_added_rows_follow_our_own(registry):
    registry.add("a third", "3")
    assert registry.names() == ["first", "second", "a third"]
    assert [registry.get(name) for name in registry.names()] == ["/", ".", "3"]
    registry.remove("a third")
    assert registry.names() == ["first", "second"]


def test_a_name_is_given_once(registry):
    with pytest.raises(ConfigError, match="there is a row 'first' already"):
        registry.add("first", "4")


def test_names_in_settings_are_checked_without_loading_a_row():
    registry = Registry("row", "notellm2_ray.no_such_group", {"first": "no_such_module:x", "second": "os.path:sep"})
    registry.check("a.b", ["second", "first"])
    with pytest.raises(ConfigError, match=r"setting 'a\.b': unknown row 'frist' .*; did you mean 'first'"):
        registry.check("a.b", ["second", "frist"])
