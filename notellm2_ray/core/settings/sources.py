"""The table of sources of notes and events. A kind of source is one file and one row here.

The file is in :mod:`notellm2_ray.data.sources`: it holds everything specific to its kind and ends in a
:class:`Source`. Another package adds a source by an entry point, a script by :func:`register_source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from notellm2_ray.core.config import Kinds
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.registry import Registry

Version = list[tuple[str, int, int]]  # path, bytes, nanoseconds of the last change; for an image the path alone


class SourceSettings(Kinds):
    """Base of a source's settings. A subclass narrows ``kind`` to its own, as in ``kind: Literal["tabular"]``."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[SourceSettings]]:
        """The settings class of every kind of source that can be loaded in this process."""
        found = {}
        for kind in SOURCES.names():
            with suppress(ConfigError):  # a broken package is an error only when its source is chosen
                found[kind] = SOURCES.get(kind).settings
        return found


def _has_times(settings: SourceSettings) -> bool:
    return False


@dataclass(frozen=True)
class Source:
    """Everything that the rest of the package needs of a kind of source.

    Attributes:
        settings: the class of the settings in ``source``; every field has a description.
        read: (settings, seed) -> the raw rows, as :class:`notellm2_ray.data.sources.SourceTables`. Ray is connected
            when it is called. It raises DataError if a file or a required column is missing.
        versions: settings -> {setting: version of its files}. When a version changes, the notes are prepared again.
            It raises DataError or FileNotFoundError if a file is missing.
        has_creation_times: whether its notes may have ``created_at``.
        invented_times: settings -> whether its events have an order but no times. The reader then makes some up, and
            every setting that needs real ones is refused.
    """

    settings: type[SourceSettings]
    read: Callable[[Any, int], Any]
    versions: Callable[[Any], Mapping[str, Version]]
    has_creation_times: bool = True
    invented_times: Callable[[Any], bool] = _has_times

    @property
    def kind(self) -> str:
        """The value of ``source.kind`` that selects this source."""
        (kind,) = get_args(self.settings.model_fields["kind"].annotation)
        return kind


SOURCES: Registry[Source] = Registry(
    "source",
    "notellm2_ray.sources",
    {
        "world": "notellm2_ray.data.sources.world:SOURCE",
        "tabular": "notellm2_ray.data.sources.tabular:SOURCE",
        "microlens": "notellm2_ray.data.sources.microlens:SOURCE",
        "movielens": "notellm2_ray.data.sources.movielens:SOURCE",
    },
)
DEFAULT = "world"


def register_source(source: Source) -> None:
    """Add a source of your own to this process and to the Ray tasks that it starts.

    Call it before :func:`notellm2_ray.cli.main`. `notellm2 run` and an online service start processes of their own,
    which find only installed sources: for those, declare the :class:`Source` as an entry point instead::

        [project.entry-points."notellm2_ray.sources"]
        mine = "my_package.my_module:SOURCE"

    Raises:
        ConfigError: there already is another source of that kind.
    """
    SOURCES.add(source.kind, source)


def default_source() -> SourceSettings:
    """The synthetic world with its defaults."""
    return SOURCES.get(DEFAULT).settings()  # type: ignore[call-arg]


def _validated_by_kind(value: Any) -> Any:
    """The settings class of a mapping's kind, filled from the mapping."""
    if not isinstance(value, Mapping):
        return value
    kind = str(value.get("kind", DEFAULT))
    try:
        row = SOURCES.get(kind)
    except ConfigError as error:
        problem = PydanticCustomError("unknown_kind", "{reason}", {"reason": str(error)})
        details = InitErrorDetails(type=problem, loc=("kind",), input=kind)
        raise ValidationError.from_exception_data("source", [details]) from None
    return row.settings.model_validate({**value, "kind": kind})


AnySource = Annotated[SerializeAsAny[SourceSettings], BeforeValidator(_validated_by_kind)]
