"""Which table and model are served, and which are to be served next: small files of the serving directory.

A table belongs to the model whose vectors it holds. One file, CURRENT, therefore names both, and replacing that file
switches the service to a new model in one step. NEXT has the same form and names the table that is to be served next.
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
    model: Path | None  # directory of the embedder; None: the model that the service was started with
    source: str = ""  # in NEXT: name of the table that this one was filled from
    source_seq: int = 0  # in NEXT: the last commit group of ``source`` that this table contains


def current(directory: str | Path) -> Served:
    """What CURRENT names; ``live.lance`` if there is no such file.

    Raises:
        DataError: CURRENT is damaged.
    """
    return _read(Path(directory), CURRENT) or Served(Path(directory) / FIRST_TABLE, None)


def current_table(directory: str | Path) -> Path:
    """The table that is served."""
    return current(directory).table


def upcoming(directory: str | Path) -> Served | None:
    """What NEXT names; None if there is no such file.

    Raises:
        DataError: NEXT is damaged.
    """
    return _read(Path(directory), NEXT)


def set_current(directory: str | Path, table: str | Path, model: str | Path | None = None) -> None:
    """Serve a table of the directory from now on; one step, which survives a power failure.

    Args:
        directory: serving directory.
        table: name of a table in it.
        model: name of a directory below its ``models``; None: the model that the service was started with.

    Raises:
        DataError: the table or the model is not there.
    """
    _write(Path(directory), CURRENT, table, model, {})


def set_upcoming(directory: str | Path, table: str | Path, model: str | Path, source: str, source_seq: int) -> None:
    """Have the service switch to a table and its model as soon as the table is up to date.

    Args:
        directory, table, model: as of :func:`set_current`.
        source: name of the table that this one was filled from.
        source_seq: the last commit group of ``source`` that it contains.
    """
    set_waiting_reason(directory, None)
    _write(Path(directory), NEXT, table, model, {"source": source, "holds": source_seq})


def keep_model(directory: str | Path, model: Path, fingerprint: str) -> Path:
    """Copy a model into the serving directory, so that ``model`` may change or be removed; the copy's path."""
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
    set_waiting_reason(directory, None)
    sync([Path(directory)])


def set_waiting_reason(directory: str | Path, reason: str | None) -> None:
    """Record why the table that NEXT names is not served yet, for the process that waits for it; None: no reason."""
    path = Path(directory) / WAITS
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, reason)


def waiting_reason(directory: str | Path) -> str:
    """What :func:`set_waiting_reason` recorded; "" for no reason."""
    try:
        return (Path(directory) / WAITS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _read(directory: Path, name: str) -> Served | None:
    path = directory / name
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        table, model = said["table"], said.get("model")
        source, source_seq = str(said.get("source", "")), int(said.get("holds", 0))
        plain = all(isinstance(one, str) and Path(one).name == one for one in (table, model) if one is not None)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path} is damaged: it must hold {{"table": "<name of a table beside it>"}}') from error
    if not plain:
        raise DataError(
            f"{path} names {table!r} and {model!r}: a table beside it and a model below {MODELS} are needed"
        )
    return Served(directory / table, None if model is None else directory / MODELS / model, source, source_seq)


def _write(directory: Path, name: str, table: str | Path, model: str | Path | None, more: dict[str, object]) -> None:
    said: dict[str, object] = {"table": Path(table).name}
    if not (directory / Path(table).name / VERSIONS).is_dir():
        raise DataError(f"{directory / Path(table).name} is not there: fill the table before naming it")
    if model is not None:
        said["model"] = Path(model).name
        if not (directory / MODELS / Path(model).name).is_dir():
            raise DataError(
                f"{directory / MODELS / Path(model).name} is not there: the table of a missing model cannot be served"
            )
    write_atomically(directory / name, json.dumps(said | more))
    sync([directory])
