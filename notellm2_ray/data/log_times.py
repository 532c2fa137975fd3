"""What the times of a source say: its first and last event, the days it covers, and what is odd about them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.errors import DataError
from notellm2_ray.data.validate import hash_ids

_DAY, _MINUTE = 86_400_000_000, 60_000_000  # microseconds
log = logging.getLogger("notellm2_ray")


class LogTimes:
    """Counts the times of notes, then of events, block by block.

    Args:
        invented: the source has no times but only an order; then nothing is said about them.
    """

    def __init__(self, invented: bool = False) -> None:
        self.invented = invented
        self._births: list[tuple[np.ndarray, np.ndarray]] = []  # hashes of note ids, microseconds
        self._known: tuple[np.ndarray, np.ndarray] | None = None
        self._days: set[int] = set()
        self._first, self._last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self._events = self._early = 0
        self._local = {"notes": 0, "events": 0}  # times without a zone
        self._zoned = {"notes": 0, "events": 0}

    def add_notes(self, notes: pa.Table) -> None:
        """Count prepared notes with their ``_local``; of a note that is there twice the newer one counts."""
        self._count_zones("notes", notes, "created_at")
        dated = notes.filter(pc.is_valid(notes["created_at"]))
        self._births.append((hash_ids(dated["note_id"]), _micros(dated["created_at"])))

    def add_events(self, events: pa.Table) -> None:
        """Count prepared events with their ``_local``; all notes must have been added."""
        if not events.num_rows:
            return
        self._count_zones("events", events, "timestamp")
        times = _micros(events["timestamp"])
        self._events += len(times)
        self._first, self._last = min(self._first, int(times.min())), max(self._last, int(times.max()))
        self._days |= set(np.unique(times // _DAY).tolist())
        self._early += int((times < self._created(events["note_id"])).sum())

    def finish(self) -> dict[str, Any]:
        """Log the facts and return them as counts.

        Raises:
            DataError: several events, and all within a minute.
        """
        if self.invented:
            log.info(
                "prepare: the source has no times; the order of each user's events is known, and their times are not"
            )
            return {"times": "invented"}
        span = self._last - self._first
        if span < _MINUTE and self._events > 1:
            raise DataError(
                f"all {self._events:,} events lie within a minute of {_shown(self._first)} ({span / 1e6:g} seconds): "
                "their times were read in the wrong unit, or are no times. Set source.time_unit or "
                "source.columns.timestamp"
            )
        early = self._early / self._events
        log.info(
            "prepare: events from %s to %s (UTC), %.1f days, some on %d of them; %s (%.1f%%) before their note existed",
            *(_shown(self._first), _shown(self._last), span / _DAY, len(self._days), f"{self._early:,}", 100 * early),
        )
        self._warn_of_zones()
        return {
            "first_event": _shown(self._first),
            "last_event": _shown(self._last),
            "days_with_events": len(self._days),
            "events_before_note": self._early,
            "times_without_zone": sum(self._local.values()),
        }

    def _warn_of_zones(self) -> None:
        local = [f"{count:,} of the {table}" for table, count in self._local.items() if count]
        zoned = [f"{count:,} of the {table}" for table, count in self._zoned.items() if count]
        if local and zoned:
            log.warning(
                "times without a zone (%s) are read as UTC beside times with one (%s): set source.time_zone to the "
                "zone of the former, such as Asia/Shanghai or UTC",
                " and ".join(local),
                " and ".join(zoned),
            )
        elif local:
            log.info("prepare: no time names its zone: all are read as UTC (source.time_zone)")

    def _count_zones(self, table: str, rows: pa.Table, column: str) -> None:
        local = pc.sum(rows["_local"]).as_py() or 0
        self._local[table] += local
        self._zoned[table] += rows.num_rows - rows[column].null_count - local

    def _created(self, note_ids: pa.ChunkedArray) -> np.ndarray:
        """(N,) when each event's note was created, the beginning of time where that is not known."""
        if self._known is None:
            hashes, times = (np.concatenate(column) for column in zip(*self._births, strict=True))
            order = np.lexsort((times, hashes))
            self._known = hashes[order], times[order]
        hashes, times = self._known
        encoded = note_ids.combine_chunks().dictionary_encode()
        if not len(hashes):
            return np.full(len(encoded), np.iinfo(np.int64).min)
        wanted = hash_ids(encoded.dictionary)
        place = np.maximum(np.searchsorted(hashes, wanted, side="right") - 1, 0)
        born = np.where(hashes[place] == wanted, times[place], np.iinfo(np.int64).min)
        return born[encoded.indices.to_numpy()]


def _micros(times: pa.ChunkedArray) -> np.ndarray:
    return times.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def _shown(micros: int) -> str:
    return str(np.datetime64(micros, "us").astype("datetime64[s]")).replace("T", " ")
