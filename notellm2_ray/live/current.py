"""Which table is served, by which model, and which is to take its place: small files of the serving directory.

A table belongs to the model whose vectors it holds, so one file, CURRENT, names both, and replacing it is the one step
in which a service goes over to a new model. NEXT, of the same form, names the table that is to be served next.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.live.durability import VERSIONS, sync, sync_new

CURRENT = "CURRENT"
NEXT = "NEXT"
WAITS = "NEXT.waits"
FIRST_TABLE = "live.lance"
MODELS = "models"


class Served(NamedTuple):
    """A table and its model."""

    table: Path
    model: Path | None  # directory of the embedder; None: the one that the service was started with
    source: str = ""  # NEXT: name of the table that it was filled from ...
    holds: int = 0  # ... and the commit group of that table up to which it has everything


def current(directory: str | Path) -> Served:
    """What is served: what CURRENT says; ``live.lance`` where there is no such file.

    Raises:
        DataError: CURRENT is damaged.
    """
    return _read(Path(directory), CURRENT) or Served(Path(directory) / FIRST_TABLE, None)


def current_table(directory: str | Path) -> Path:
    """The table that is served."""
    return current(directory).table


def upcoming(directory: str | Path) -> Served | None:
    """What is to be served next: what NEXT says; None where there is no such file.

    Raises:
        DataError: NEXT is damaged.
    """
    return _read(Path(directory), NEXT)


def set_current(directory: str | Path, table: str | Path, model: str | Path | None = None) -> None:
    """Make a table of the directory the one that is served, in one step that survives a loss of power.

    Args:
        directory: serving directory.
        table: name of a table in it.
        model: name of a directory below its ``models``; None: the model that the service is started with.

    Raises:
        DataError: one of them is not there.
    """
    _write(Path(directory), CURRENT, table, model, {})


def set_upcoming(directory: str | Path, table: str | Path, model: str | Path, source: str, holds: int) -> None:
    """Have the service take over a table and its model as soon as the table is up to date; as :func:`set_current`.

    Args:
        source: name of the table that it was filled from.
        holds: commit group of that table up to which it has everything.
    """
    tell(directory, None)
    _write(Path(directory), NEXT, table, model, {"source": source, "holds": holds})


def keep_model(directory: str | Path, model: Path, fingerprint: str) -> Path:
    """A copy of a model in the serving directory, which lasts whatever becomes of ``model``; where it lies."""
    kept = Path(directory) / MODELS / fingerprint
    if not kept.is_dir():
        unfinished = kept.with_name(f".{fingerprint}")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(model, unfinished)
        sync_new(unfinished, set())
        unfinished.rename(kept)
        sync([kept.parent])
    return kept


def forget_upcoming(directory: str | Path) -> None:
    """Remove NEXT: nothing is to be served next."""
    (Path(directory) / NEXT).unlink(missing_ok=True)
    tell(directory, None)
    sync([Path(directory)])


def tell(directory: str | Path, reason: str | None) -> None:
    """Leave word why what NEXT names is not served yet, for who waits for it; None: there is no reason."""
    path = Path(directory) / WAITS
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, reason)


def told(directory: str | Path) -> str:
    """What :func:`tell` left; "" for nothing."""
    try:
        return (Path(directory) / WAITS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _read(directory: Path, name: str) -> Served | None:
    path = directory / name
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        table, model = said["table"], said.get("model")
        source, holds = str(said.get("source", "")), int(said.get("holds", 0))
        plain = all(isinstance(one, str) and Path(one).name == one for one in (table, model) if one is not None)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path} is damaged: it must hold {{"table": "<name of a table beside it>"}}') from error
    if not plain:
        raise DataError(f"{path} names {table!r} and {model!r}, which are not a table beside it and a model")
    return Served(directory / table, None if model is None else directory / MODELS / model, source, holds)


def _write(directory: Path, name: str, table: str | Path, model: str | Path | None, more: dict[str, object]) -> None:
    said: dict[str, object] = {"table": Path(table).name}
    if not (directory / Path(table).name / VERSIONS).is_dir():
        raise DataError(f"{directory / Path(table).name} is not there: fill the new table before it is named")
    if model is not None:
        said["model"] = Path(model).name
        if not (directory / MODELS / Path(model).name).is_dir():
            raise DataError(f"{directory / MODELS / Path(model).name} is not there: its table cannot be served")
    write_atomically(directory / name, json.dumps(said | more))
    sync([directory])
