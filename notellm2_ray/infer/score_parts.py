"""Scoring cut into parts: runs of whole examples, the units that are scored, committed and, after a kill, redone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.schema import QUARANTINE_SCHEMA, SCORE_SCHEMA
from notellm2_ray.infer.summary_parts import write

PARTS, QUARANTINE = "parts", "quarantine"
_COUNTS = b"notellm2.counts"


class Part(NamedTuple):
    """Some examples' candidates, one example after the other."""

    part_id: str
    places: list[int]  # in the candidates' file
    table: int = 0  # the place of the table, where several are scored together


class Scored(NamedTuple):
    """A finished part's counts."""

    part_id: str
    scored: int
    quarantined: int
    prompt_tokens: int
    cached_tokens: int  # of these, found in the prefix cache instead of computed


def plan_parts(example_of: np.ndarray, requests: int, made_by: str) -> list[Part]:
    """Cut candidates into parts of whole examples.

    Args:
        example_of: (R,) the example of each candidate.
        requests: candidates in a part at least (the last may have fewer).
        made_by: fingerprint of all that shapes a score; part of a part's id.
    """
    order = np.argsort(example_of, kind="stable")
    ends = np.flatnonzero(np.diff(example_of[order], append=-1)) + 1  # where each example's candidates end
    parts: list[Part] = []
    begin = 0
    for end in ends.tolist():
        if end - begin >= requests or end == len(order):
            digest = fingerprint(made_by, begin, end)[:12]
            parts.append(Part(f"{len(parts):06d}-{digest}", order[begin:end].tolist()))
            begin = end
    return parts


def commit_part(
    output: Path, part: Part, rows: Sequence[dict[str, Any]], bad: Sequence[tuple[str, str]], tokens: tuple[int, int]
) -> Scored:
    """Write a part's files, the scores last: their presence says that the part is done.

    Args:
        rows: SCORE_SCHEMA. bad: (example and note, reason) of candidates without a score.
        tokens: of the prompts, and of these found in the prefix cache.
    """
    if bad:
        lost = [{"table": "candidates", "source": part.part_id, "key": key, "reason": reason} for key, reason in bad]
        write(output / QUARANTINE / f"{part.part_id}.parquet", pa.Table.from_pylist(lost, schema=QUARANTINE_SCHEMA))
    counts = ",".join(str(count) for count in (len(rows), len(bad), *tokens))
    table = pa.Table.from_pylist(list(rows), schema=SCORE_SCHEMA.with_metadata({_COUNTS: counts.encode()}))
    write(_path(output, part.part_id), table)
    _attempts(output, part.part_id).unlink(missing_ok=True)
    return Scored(part.part_id, len(rows), len(bad), *tokens)


def read_scored(output: Path, part_id: str) -> Scored | None:
    """The counts of a part, or None where it is still to be done.

    Raises:
        OutputError: its file is damaged.
    """
    path = _path(output, part_id)
    try:
        counts = (pq.read_schema(path).metadata or {})[_COUNTS].decode().split(",")
        return Scored(part_id, *map(int, counts))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise OutputError(f"{path} is damaged ({error}): delete it and run the command again") from error


def begin_attempt(output: Path, part_id: str) -> int:
    """Note down that a part is begun; how often it now was. It outlives the actor, which a part may be killing."""
    with open(_attempts(output, part_id), "ab") as file:
        file.write(b".")
        return file.tell()


def clear_leftovers(output: Path, parts: Sequence[Part]) -> int:
    """Remove what a killed run half wrote and parts that are not of this job; how many of those were finished."""
    names = {f"{part.part_id}.parquet" for part in parts}
    removed = 0
    for folder in (PARTS, QUARANTINE):
        (output / folder).mkdir(parents=True, exist_ok=True)
        for path in (output / folder).iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)
                removed += folder == PARTS and path.suffix == ".parquet"
    return removed


def compile_scores(output: Path, parts: Sequence[Part]) -> int:
    """Write ``scores.parquet``, the parts one after the other; the number of rows."""
    tables = [pq.read_table(_path(output, part.part_id)).replace_schema_metadata(None) for part in parts]
    table = pa.concat_tables(tables) if tables else SCORE_SCHEMA.empty_table()
    write(output / "scores.parquet", table)
    return len(table)


def first_reasons(output: Path, limit: int = 3) -> list[str]:
    """Reasons of some quarantined candidates, to be shown in an error."""
    return list(_reasons(output))[:limit]


def _reasons(output: Path) -> Iterator[str]:
    for path in sorted((output / QUARANTINE).glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            yield f"{row['key']}: {row['reason']}"


def _path(output: Path, part_id: str) -> Path:
    return output / PARTS / f"{part_id}.parquet"


def _attempts(output: Path, part_id: str) -> Path:
    return output / PARTS / f"{part_id}.attempts"
