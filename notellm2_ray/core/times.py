"""How a time is read: one rule for tables and for requests.

A number is read by its size, each by itself. From 1990 to 2200 no two readings of a number overlap::

    19900101 to 21991231                YYYYMMDD
    631152000 to 7258118399             seconds since 1970
    ...000 times that                   milliseconds; once more microseconds; once more nanoseconds
    19900101000000 to 21991231235959    YYYYMMDDHHMMSS

Any other number is no time. A unit can be named instead; then a number that lies outside these years in it is no time.
Text is ISO 8601, or a number. Numbers since 1970 are UTC. Dates, and times that name no zone, are local: they are in
the zone that the reader names.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np

Unit = Literal["auto", "s", "ms", "us", "ns", "date"]
EARLIEST, END = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000 for year in (1990, 2200))
YEARS = "the years 1990 to 2199"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Readings(NamedTuple):
    """Numbers read as times."""

    micros: np.ndarray  # (N,) int64 microseconds since 1970, local ones as if their zone were UTC; 0 where not fine
    fine: np.ndarray  # (N,) bool: it is a time from 1990 to 2199
    local: np.ndarray  # (N,) bool: it is a date without a zone


def read_numbers(values: np.ndarray, unit: Unit = "auto") -> Readings:
    """Times from (N,) int64 or float64 numbers; NaN is no time."""
    micros = np.zeros(len(values), np.int64)
    fine, local = np.zeros(len(values), bool), np.zeros(len(values), bool)
    for name in _PER_SECOND if unit == "auto" else {unit} & _PER_SECOND.keys():
        per_second = _PER_SECOND[name]
        low, high = (bound // 10**6 * per_second for bound in (EARLIEST, END))
        inside = (values >= low) & (values < high)
        micros[inside] = _to_micros(values[inside], per_second)
        fine |= inside
    if unit in ("auto", "date"):
        days, is_date = _read_dates(values)
        micros, fine, local = np.where(is_date, days, micros), fine | is_date, is_date
    return Readings(micros, fine, local)


def describe_unit(unit: Unit) -> str:
    """How numbers were read, for a message about one that is no time."""
    if unit == "auto":
        return "read as s, ms, us or ns since 1970, or as YYYYMMDD; source.time_unit names one of them"
    return f"read as {'YYYYMMDD' if unit == 'date' else unit + ' since 1970'}; see source.time_unit"


def read_time(value: object, zone: str | None = None) -> datetime:
    """One time in UTC, from a number, a text or a datetime.

    Args:
        zone: of local times, such as "Asia/Shanghai"; None: they are refused.

    Raises:
        ValueError: it is no time from 1990 to 2199, or it is local and there is no zone.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value) if re.search(r"[.eE]", value) else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str | datetime):
        raise ValueError(f"a {type(value).__name__} is not a time")
    if isinstance(value, int | float):
        time, local = _from_number(value)
    else:
        time = _from_iso(value) if isinstance(value, str) else value
        local = time.tzinfo is None
    if local:
        if zone is None:
            raise ValueError(f"{value} has no time zone: give one, as in 2024-05-31T12:00:00Z")
        time = time.replace(tzinfo=ZoneInfo(zone))
    if not 1990 <= time.year < 2200:
        raise ValueError(f"{value} is outside {YEARS}")
    return time.astimezone(UTC)


def is_local(text: str) -> bool:
    """Whether a text that :func:`read_time` reads names no time zone."""
    if _NUMBER.fullmatch(text.strip()):
        return bool(read_numbers(np.array([float(text)])).local[0])
    return _from_iso(text).tzinfo is None


def _from_number(value: int | float) -> tuple[datetime, bool]:
    whole = isinstance(value, int) and abs(value) < 2**63
    readings = read_numbers(np.array([value], np.int64 if whole else np.float64))
    if not readings.fine[0]:
        raise ValueError(f"{value} is outside {YEARS} (s, ms, us or ns since 1970, or YYYYMMDD)")
    time = _EPOCH + np.timedelta64(int(readings.micros[0]), "us").astype(object)
    return (time.replace(tzinfo=None), True) if readings.local[0] else (time, False)


def _from_iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is not a time: give ISO 8601 (2024-05-31T12:00:00Z) or a number") from None


def _to_micros(values: np.ndarray, per_second: int) -> np.ndarray:
    if per_second > 10**6:
        return np.floor(values / 1000).astype(np.int64) if values.dtype.kind == "f" else values // 1000
    factor = 10**6 // per_second
    return np.rint(values * factor).astype(np.int64) if values.dtype.kind == "f" else values * factor


def _read_dates(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) microseconds and (N,) bool, of numbers that are YYYYMMDD or YYYYMMDDHHMMSS."""
    whole = (values == np.floor(values)) & (values >= 19900101) & (values < 22_000_000_000_000)
    numbers = np.where(whole, values, 0).astype(np.int64)
    long = numbers >= 19900101000000
    day, clock = np.where(long, numbers // 10**6, numbers), np.where(long, numbers % 10**6, 0)
    year, month, of_month = day // 10_000, day // 100 % 100, day % 100
    hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
    whole &= (year >= 1990) & (year < 2200) & (month >= 1) & (month <= 12) & (hour < 24) & (minute < 60) & (second < 60)
    months = np.where(whole, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + np.where(whole, of_month - 1, 0)
    whole &= (of_month >= 1) & (days.astype("datetime64[M]") == months)
    micros = days.astype("datetime64[us]").astype(np.int64) + (hour * 3600 + minute * 60 + second) * 10**6
    return np.where(whole, micros, 0), whole
