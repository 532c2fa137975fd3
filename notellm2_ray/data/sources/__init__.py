"""Where notes and events come from. Every kind of source is one file here and one row of
:data:`notellm2_ray.core.settings.sources.SOURCES`, and gives the same two raw tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.sources import SOURCES, Source, SourceSettings, Version

if TYPE_CHECKING:
    import ray.data


class SourceTables(NamedTuple):
    """Raw rows as lazy Ray datasets, in our column names.

    Two more columns: ``_source`` says where a row comes from ("file:row"), and ``_error``, which may be absent, why the
    reader could not use it. An image is a path, a URI or encoded bytes. The reader leaves out no row silently.
    """

    notes: ray.data.Dataset
    events: ray.data.Dataset
    invented_times: bool = False  # an event's time says only its place in its user's sequence


def open_source(settings: SourceSettings, seed: int) -> SourceTables:
    """The tables of a source; Ray must be connected.

    Args:
        seed: of the synthetic world; the other sources draw nothing at random.

    Raises:
        DataError: a file or a required column is missing, with the setting to change.
    """
    source = SOURCES.get(settings.kind)
    if SOURCES.is_added(settings.kind):
        _send_code_along(source)
    return source.read(settings, seed)


def _send_code_along(source: Source) -> None:
    """Send the module's functions and classes to Ray's workers, which may not be able to import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[source.read.__module__])


def table_versions(settings: SourceSettings) -> dict[str, Version] | None:
    """What a source watches for changes, by the setting that names it; None where a file is missing."""
    try:
        return dict(SOURCES.get(settings.kind).versions(settings))
    except (DataError, FileNotFoundError):
        return None
