"""The table of sources, which notes and events come from. A kind of source is one file, and one row here.

The file is below :mod:`notellm2_ray.data.sources`: it holds all that is special to its kind, and ends in a
:class:`Source`. Another package adds a source through an entry point, a script through :func:`register_source`.
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

Version = list[tuple[str, int, int]]  # path, bytes, nanoseconds of the last change; an image has its path alone


class SourceSettings(Kinds):
    """Base of a source's settings. A subclass narrows ``kind`` to its own, as in ``kind: Literal["tabular"]``."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[SourceSettings]]:
        """The settings class of every kind of source that can be loaded in this process."""
        found = {}
        for kind in SOURCES.names():
            with suppress(ConfigError):  # a broken package is an error for whoever chooses its source, not for all
                found[kind] = SOURCES.get(kind).settings
        return found


@dataclass(frozen=True)
class Source:
    """All that the rest of the package asks of a kind of source.

    Attributes:
        settings: the settings below ``source``, with a description at each field.
        read: (settings, seed) -> the raw rows, as :class:`notellm2_ray.data.sources.SourceTables`; Ray is connected. It
            raises DataError where a file or a required column is missing.
        versions: settings -> what is watched for changes: setting -> the version of its files. What was prepared is
            prepared anew when one changes. It raises DataError or FileNotFoundError where a file is missing.
        has_creation_times: whether its notes have ``created_at``.
    """

    settings: type[SourceSettings]
    read: Callable[[Any, int], Any]
    versions: Callable[[Any], Mapping[str, Version]]
    has_creation_times: bool = True

    @property
    def kind(self) -> str:
        """The ``source.kind`` that chooses it."""
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
    """Make a source of your own available in this process, as ``source.kind``, and to the Ray tasks that it starts.

    Call it before :func:`notellm2_ray.cli.main`. `notellm2 run` and an online service start processes of their own,
    which find only installed sources: for those, declare the :class:`Source` as an entry point instead::

        [project.entry-points."notellm2_ray.sources"]
        mine = "my_package.my_module:SOURCE"

    Raises:
        ConfigError: there is another source of that kind.
    """
    SOURCES.add(source.kind, source)


def default_source() -> SourceSettings:
    """The synthetic world with its defaults."""
    return SOURCES.get(DEFAULT).settings()  # type: ignore[call-arg]


def _of_its_kind(value: Any) -> Any:
    """A mapping as the settings of its kind."""
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


AnySource = Annotated[SerializeAsAny[SourceSettings], BeforeValidator(_of_its_kind)]
