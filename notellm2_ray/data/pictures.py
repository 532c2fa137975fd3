"""A column of pictures in any form that tables have, as one struct of bytes and path.

A cell may hold a path or ``file://`` URI, encoded bytes, Hugging Face's image struct (``{bytes, path}``; the bytes
count if both are there), or a list of these. Of a list the first picture that is not blank is the cover, and the only
one read. A struct or list may also be written as text (:mod:`notellm2_ray.data.literals`); bytes in JSON are base64.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.data.columns import Column, convert_each, flat, is_blank, is_bytes, is_text, show, to_text
from notellm2_ray.data.literals import is_bracketed, parse

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_EXPECTED = "give a path, a file:// URI, the encoded bytes, a struct of bytes and path, or a list of these"


def to_pictures(array: pa.Array | pa.ChunkedArray) -> Column:
    """A column of any type as :data:`PICTURE`, null where there is no picture; converting it again changes nothing."""
    array = flat(array)
    kind = array.type
    if pa.types.is_null(kind) or (pa.types.is_floating(kind) and _all_missing(array)):
        return Column(pa.nulls(len(array), PICTURE), {})
    if is_text(kind):
        return _from_text(array)
    if is_bytes(kind):
        return Column(_pictures(array.cast(pa.binary()), pa.nulls(len(array), pa.string())), {})
    if pa.types.is_struct(kind) and {"bytes", "path"} & set(kind.names):
        return _from_struct(array)
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return _covers(array)
    problem = f"is of type {kind}: {_EXPECTED}"
    return Column(pa.nulls(len(array), PICTURE), dict.fromkeys(map(int, np.flatnonzero(array.is_valid())), problem))


def json_pictures(values: Iterable[object]) -> Column:
    """Pictures from JSON values of several types."""
    return convert_each(values, _picture, PICTURE)


def _all_missing(array: pa.Array) -> bool:
    """Whether an array of floats holds nothing: pandas writes a column of missing values as NaN."""
    return not pc.any(pc.is_finite(array)).as_py()


def _pictures(data: pa.Array, path: pa.Array) -> pa.Array:
    missing = ~data.is_valid().to_numpy(zero_copy_only=False) & is_blank(path)
    return pa.StructArray.from_arrays([data, path], fields=list(PICTURE), mask=pa.array(missing))


def _from_text(array: pa.Array) -> Column:
    text, problems = to_text(array)
    if pc.any(pc.match_substring_regex(text, r"^\s*[\[({]")).as_py():
        pictures, more = json_pictures(text.to_pylist())
        return Column(pictures, problems | more)
    return Column(_pictures(pa.nulls(len(text), pa.binary()), text), problems)


def _from_struct(array: pa.StructArray) -> Column:
    nothing = pa.nulls(len(array))
    fields = {name: pc.struct_field(array, name) if name in array.type.names else nothing for name in PICTURE.names}
    if not (is_bytes(fields["bytes"].type) or pa.types.is_null(fields["bytes"].type)):
        return json_pictures(array.to_pylist())
    path, problems = to_text(fields["path"])
    return Column(_pictures(fields["bytes"].cast(pa.binary()), path), problems)


def _covers(array: pa.ListArray) -> Column:
    """The first picture of each list; of the others nothing is copied."""
    parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
    pictures, problems = to_pictures(pc.list_flatten(array))
    usable = np.flatnonzero(pictures.is_valid().to_numpy(zero_copy_only=False))
    rows, first = np.unique(parents[usable], return_index=True)
    place = np.full(len(array), -1)
    place[rows] = usable[first]
    found = pictures.take(pa.array(place, mask=place < 0))
    return Column(found, {int(parents[at]): text for at, text in problems.items() if place[parents[at]] < 0})


def _picture(value: Any, written: bool = False) -> dict[str, Any] | None:
    """One cell as a picture; None: it is blank.

    Raises:
        ValueError: it is of no known form.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        if not written and is_bracketed(value):
            try:
                return _picture(parse(value), written=True)
            except ValueError:
                pass  # a file may be called [1].jpg
        return {"path": value} if value.strip() else None
    if isinstance(value, bytes):
        return {"bytes": value}
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        data = value.get("bytes")
        data = base64.b64decode(data, validate=True) if isinstance(data, str) else data
        return _picture(data) or _picture(value.get("path"), written=True)
    if isinstance(value, list | tuple):
        return next((found for found in (_picture(one, written=True) for one in value) if found), None)
    raise ValueError(f"is of type {type(value).__name__}: {_EXPECTED}: {show(value)}")
