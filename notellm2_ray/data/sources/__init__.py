"""Where notes and events come from: one module a kind of source, each giving the same two raw tables."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import ray.data

    from notellm2_ray.core.settings.data import Source

_READERS = {
    "world": ("notellm2_ray.data.sources.world", "world_tables"),
    "tabular": ("notellm2_ray.data.sources.tabular", "tabular_tables"),
    "microlens": ("notellm2_ray.data.sources.microlens", "microlens_tables"),
    "movielens": ("notellm2_ray.data.sources.movielens", "movielens_tables"),
}


class SourceTables(NamedTuple):
    """Raw rows as lazy Ray datasets, in our column names.

    Beside those, ``_source`` says where a row comes from ("file:row"), and ``_error`` (which may be absent) why the
    reader could make nothing of it. An image is a path, a URI or encoded bytes. No row is left out without a word.
    """

    notes: ray.data.Dataset
    events: ray.data.Dataset


def open_source(source: Source, seed: int) -> SourceTables:
    """The tables of a source; Ray must be connected.

    Args:
        source: one of the ``source.kind``s.
        seed: of the synthetic world; the others do not draw.

    Raises:
        DataError: a file or a required column is missing, with the setting to change.
    """
    module, reader = _READERS[source.kind]
    return getattr(import_module(module), reader)(source, seed)
