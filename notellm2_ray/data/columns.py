"""Arrow columns of any type converted to ours, together with the rows whose values cannot be converted.

Text is never altered: a special token, a quote or a line break inside it is data. Numbers become ids: 7 and 7.0 are
both "7", because pandas turns an integer column with a missing value into floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.times import EARLIEST, END, YEARS, Unit, describe_unit, is_local, read_numbers, read_time
from notellm2_ray.data.literals import split_topics

TIMESTAMP = pa.timestamp("us", tz="UTC")
TOPICS = pa.list_(pa.string())
_EXACT = 2**53


class Column(NamedTuple):
    """A converted column."""

    values: pa.Array  # null where the value is missing or wrong
    problems: dict[int, str]  # row of each wrong value -> what is wrong with it


class Times(NamedTuple):
    """A converted column of times."""

    values: pa.Array  # TIMESTAMP, null where the value is missing or wrong
    problems: dict[int, str]
    local: np.ndarray  # (N,) bool: neither the value nor a setting says in which zone it is


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


def to_timestamps(array: pa.Array | pa.ChunkedArray, unit: Unit = "auto", zone: str | None = None) -> Times:
    """UTC microseconds from times, dates, ISO 8601 text or numbers, as :mod:`notellm2_ray.core.times` reads them.

    Args:
        array: the column; text that is a number is read as one.
        unit: of the numbers.
        zone: of dates and of times without a zone; None: UTC, and :attr:`Times.local` says which they are.
    """
    array = flat(array)
    kind = array.type
    if is_text(kind) or is_bytes(kind):
        return _from_text(array, unit, zone)
    if pa.types.is_timestamp(kind):
        return _from_numbers(array.cast(pa.int64()), kind.unit, zone, f"read as {kind}", local=kind.tz is None)
    if pa.types.is_date(kind):
        seconds = pc.multiply(array.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()), 86_400)
        return _from_numbers(seconds, "s", zone, f"read as {kind}", local=True)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = array.cast(pa.int64() if pa.types.is_integer(kind) else pa.float64(), safe=False)
        return _from_numbers(numbers, unit, zone, describe_unit(unit))
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    problems = {int(row): f"is of type {kind}, not a time" for row in rows}
    return Times(pa.nulls(len(array), TIMESTAMP), problems, np.zeros(len(array), bool))


def _from_numbers(array: pa.Array, unit: Unit, zone: str | None, reading: str, local: bool = False) -> Times:
    """Times from int64 or float64 numbers; all are without a zone if ``local``, else those that are dates."""
    values = array.fill_null(0).to_numpy(zero_copy_only=False)
    micros, fine, is_date = read_numbers(values, unit)
    given = array.is_valid().to_numpy(zero_copy_only=False) & (values == values)  # NaN is how pandas writes null
    wrong = np.flatnonzero(given & ~fine)
    problems = {int(row): f"{values[row]:.15g} is outside {YEARS} ({reading})" for row in wrong}
    return _in_utc(micros, fine & given, local | is_date, zone, problems)


def _in_utc(
    micros: np.ndarray, fine: np.ndarray, local: np.ndarray | bool, zone: str | None, problems: dict[int, str]
) -> Times:
    times, without_zone = pa.array(micros, mask=~fine), local & fine
    if zone is not None and without_zone.any():
        there = times.cast(pa.timestamp("us"))
        utc = pc.assume_timezone(there, zone, ambiguous="earliest", nonexistent="latest").cast(pa.int64())
        times, without_zone = pc.if_else(pa.array(without_zone), utc, times), np.zeros(len(times), bool)
    return Times(times.cast(TIMESTAMP), problems, without_zone)


def _from_text(array: pa.Array, unit: Unit, zone: str | None) -> Times:
    text, problems = to_text(array)
    text = pc.utf8_trim_whitespace(text)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    numeric = pc.fill_null(pc.match_substring_regex(text, r"^[+-]?\d+(\.\d*)?([eE][+-]?\d+)?$"), False)
    nothing = pa.scalar(None, pa.string())
    numbers = _from_numbers(_cast_numbers(pc.if_else(numeric, text, nothing)), unit, zone, describe_unit(unit))
    written = _from_iso(pc.if_else(numeric, nothing, text), zone)
    values = pc.coalesce(numbers.values, written.values)
    return Times(values, problems | numbers.problems | written.problems, numbers.local | written.local)


def _cast_numbers(text: pa.Array) -> pa.Array:
    try:
        return text.cast(pa.int64())  # all digits of nanoseconds
    except pa.ArrowInvalid:
        return text.cast(pa.float64())


def _from_iso(text: pa.Array, zone: str | None) -> Times:
    for kind in (pa.timestamp("us"), TIMESTAMP):  # Arrow reads a column with zones or one without, not a mixture
        try:
            micros = text.cast(kind).cast(pa.int64()).fill_null(EARLIEST).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            continue
        fine = (micros >= EARLIEST) & (micros < END)
        problems = {int(row): f"{text[int(row)]} is outside {YEARS}" for row in np.flatnonzero(~fine)}
        return _in_utc(micros, fine & text.is_valid().to_numpy(zero_copy_only=False), kind.tz is None, zone, problems)
    texts = text.to_pylist()
    values, problems = convert_each(texts, lambda value: read_time(value, zone or "UTC"), TIMESTAMP)
    good = values.is_valid().to_pylist()
    local = [zone is None and fine and is_local(value) for value, fine in zip(texts, good, strict=True)]
    return Times(values, problems, np.array(local, bool))
