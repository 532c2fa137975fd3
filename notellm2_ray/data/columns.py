"""Arrow columns of any type converted to ours, together with the rows whose values cannot be converted.

Text is never altered: a special token, a quote or a line break inside it is data. Numbers become ids: 7 and 7.0 are
both "7", because pandas turns an integer column with a missing value into floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.data.literals import split_topics

TIMESTAMP = pa.timestamp("us", tz="UTC")
TOPICS = pa.list_(pa.string())
UNIT_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
# A time outside these years was read in the wrong unit. Microseconds within them are exact in a float64.
_EARLIEST, _LATEST = (datetime(year, 1, 1, tzinfo=UTC).timestamp() * 1e6 for year in (1900, 2200))
_EXACT = 2**53


class Column(NamedTuple):
    """A converted column."""

    values: pa.Array  # null where the value is missing or wrong
    problems: dict[int, str]  # row of each wrong value -> what is wrong with it


def flat(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One plain array out of a chunked, dictionary-encoded or extension one."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_blank(text: pa.Array) -> np.ndarray:
    """``(N,)`` bool: null or nothing but white space."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(text)), 0)
    return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)


def show(value: object) -> str:
    """A value as text that is short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_text(array: pa.Array | pa.ChunkedArray) -> Column:
    """Strings. Whole numbers and times become strings; values of other types are problems."""
    array = flat(array)
    kind = array.type
    if is_text(kind) or is_bytes(kind):
        return _decoded(array)
    if pa.types.is_floating(kind):
        return _whole_numbers(array)
    if pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_temporal(kind):
        return Column(array.cast(pa.string()), {})
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    return Column(pa.nulls(len(array), pa.string()), {int(row): f"is of type {kind}, not text" for row in rows})


def _decoded(array: pa.Array) -> Column:
    try:
        text = array.cast(pa.string())
        text.validate(full=True)
        return Column(text, {})
    except pa.ArrowInvalid:
        return convert_each(array.cast(pa.large_binary()).to_pylist(), lambda value: value.decode("utf-8"), pa.string())


def convert_each(values: Iterable[object], convert: Callable, kind: pa.DataType) -> Column:
    """The slow way, value by value, for columns that hold a wrong value."""
    converted, problems = [], {}
    for row, value in enumerate(values):
        try:
            converted.append(None if value is None else convert(value))
        except UnicodeError:
            problems[row] = f"is not valid Unicode: {show(value)}"
            converted.append(None)
        except ValueError as error:
            problems[row] = str(error)
            converted.append(None)
    return Column(pa.array(converted, kind), problems)


def _whole_numbers(array: pa.Array) -> Column:
    values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    whole = np.isfinite(values) & (np.abs(values) < _EXACT) & (values == np.floor(values))
    numbers = pa.array(np.where(whole, values, 0).astype(np.int64), mask=~whole)
    wrong = np.flatnonzero(~whole & ~np.isnan(values))
    return Column(numbers.cast(pa.string()), {int(row): f"is the number {values[row]}, not text" for row in wrong})


def text_of(value: object) -> str:
    """One JSON value as text.

    Raises:
        ValueError: it is a bool, a list, an object or a fraction, or a text with half a surrogate pair.
    """
    if isinstance(value, str):
        value.encode("utf-8")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    raise ValueError(f"is of type {type(value).__name__}, not text: {show(value)}")


def json_text(values: Iterable[object]) -> Column:
    """Strings from JSON values of several types."""
    return convert_each(values, text_of, pa.string())


def json_times(values: Iterable[object]) -> Column:
    """Times as text from JSON values of several types, with all digits of a number.

    :func:`to_timestamps` then reads each value by itself, so that a wrong one costs only its own row.
    """

    def written(value: object) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return None if value != value else repr(value)  # NaN is how pandas writes a missing number
        return text_of(value)

    return convert_each(values, written, pa.string())


def topic_lists(values: Iterable[object], separator: str | None) -> Column:
    """Topics from lists, or from strings as :func:`split_topics` splits them; blank topics are left out."""

    def split(value: object) -> list[str]:
        if isinstance(value, list):
            return [topic for topic in (text_of(part) for part in value if part is not None) if topic.strip()]
        parts = (text_of(part).strip() for part in split_topics(text_of(value), separator) if part is not None)
        return [part for part in parts if part]

    return convert_each(values, split, TOPICS)


def to_topics(array: pa.Array | pa.ChunkedArray, separator: str | None = None) -> Column:
    """``list<string>`` from lists, or from strings (:func:`split_topics`); null where there are none."""
    array = flat(array)
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return topic_lists(array.to_pylist(), separator)
    text, problems = to_text(array)
    lists, more = topic_lists(text.to_pylist(), separator)
    return Column(lists, problems | more)


def to_timestamps(array: pa.Array | pa.ChunkedArray, unit: str = "s") -> Column:
    """UTC microseconds from times, dates, ISO 8601 text (UTC unless it names a zone) or numbers since 1970.

    Args:
        array: the column; text that is a number is read as one.
        unit: of the numbers: ``s``, ``ms`` or ``us``.
    """
    array = flat(array)
    kind = array.type
    if is_text(kind) or is_bytes(kind):
        return _from_text(array, unit)
    if pa.types.is_timestamp(kind):
        factors = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
        return _from_numbers(array.cast(pa.int64()), factors[kind.unit], kind)
    if pa.types.is_date(kind):
        days = pa.types.is_date32(kind)
        return _from_numbers(array.cast(pa.int32() if days else pa.int64()), 86_400e6 if days else 1e3, kind)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _from_numbers(array, UNIT_MICROSECONDS[unit], f"{unit} since 1970; see source.time_unit")
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    return Column(pa.nulls(len(array), TIMESTAMP), {int(row): f"is of type {kind}, not a time" for row in rows})


def _from_numbers(array: pa.Array, factor: float, reading: object) -> Column:
    if factor < 1 and pa.types.is_integer(array.type):  # nanoseconds are too large for a float64's exact integers
        array, factor = pc.floor(pc.divide(array, 1000)), 1.0
    values = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):
        micros = np.rint(values * factor)
        fine = (micros >= _EARLIEST) & (micros <= _LATEST)
    wrong = np.flatnonzero(~fine & ~np.isnan(values))
    problems = {int(row): f"{values[row]:.15g} is outside the years 1900 to 2200 (read as {reading})" for row in wrong}
    times = pa.array(np.where(fine, micros, 0).astype(np.int64), mask=~fine).cast(TIMESTAMP)
    return Column(times, problems)


def _from_text(array: pa.Array, unit: str) -> Column:
    text, problems = to_text(array)
    text = pc.utf8_trim_whitespace(text)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    numeric = pc.fill_null(pc.match_substring_regex(text, r"^[+-]?\d+(\.\d*)?([eE][+-]?\d+)?$"), False)
    nothing = pa.scalar(None, pa.string())
    numbers = _from_numbers(pc.if_else(numeric, text, nothing).cast(pa.float64()), UNIT_MICROSECONDS[unit],
                            f"{unit} since 1970; see source.time_unit")  # fmt: skip
    written = _from_iso(pc.if_else(numeric, nothing, text))
    return Column(pc.coalesce(numbers.values, written.values), problems | numbers.problems | written.problems)


def _from_iso(text: pa.Array) -> Column:
    for kind in (pa.timestamp("us"), TIMESTAMP):  # Arrow reads a column with zones or one without, not a mixture
        try:
            return _from_numbers(text.cast(kind).cast(pa.int64()), 1, kind)
        except pa.ArrowInvalid:
            continue
    return convert_each(text.to_pylist(), _parse_iso, TIMESTAMP)


def _parse_iso(value: str) -> datetime:
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{show(value)} is not a time: give ISO 8601 (2024-05-31T12:00:00Z) or a number") from None
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
    if not 1900 <= time.year < 2200:
        raise ValueError(f"{show(value)} is outside the years 1900 to 2200")
    return time
