"""Progress of long work: how much is done, how fast, and the time left, in a log line every few seconds."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

log = logging.getLogger("notellm2_ray")

LOG_SECONDS = 5.0  # between lines
SILENT_SECONDS = 60.0  # after which a line is repeated although nothing new was done


class Progress:
    """Counts what is done and logs ``label: 120 / 500 notes, 3.2 notes/s, 1 min 59 s left``.

    :meth:`add` logs when a line is due, and when everything is done. Inside a ``with`` block a thread logs instead, so
    that there are lines too while nothing is finished, and leaving the block logs the last one.

    Args:
        label: what each line begins with: the stage as on the command line.
        unit: what is counted, in the plural.
        total: how many in all; None where that is unknown.
        before: how many an earlier run did; they count as done but not towards the rate.
        waits_for: what has to come before anything can be done.
    """

    def __init__(
        self, label: str, unit: str, total: int | None = None, *, before: int = 0, waits_for: str = "the first result"
    ) -> None:
        self.label, self.unit, self.total, self.before, self.waits_for = label, unit, total, before, waits_for
        self.added = 0
        self._rates: dict[str, float] = {}  # further counts, shown as rates
        self._text = ""
        self._started = self._latest = self._shown_at = time.monotonic()
        self._first: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self.before:
            log.info("%s: %s of %s %s are done already", self.label, *self._counts(self.before), self.unit)
        self._thread = threading.Thread(target=self._log_until_stopped, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        if self.added:
            log.info("%s", self.line())

    def add(self, count: int = 1, text: str = "", **rates: float) -> None:
        """Count ``count`` more as done.

        Args:
            text: shown in the next line, such as a loss.
            rates: further counts by their units, such as ``tokens=120``; their sums are shown per second.
        """
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        self._latest, self._text = now, text
        self.added += count
        for unit, amount in rates.items():
            self._rates[unit] = self._rates.get(unit, 0) + amount
        finished = self.total is not None and self.before + self.added >= self.total
        if self._thread is None and (finished or now - self._shown_at >= LOG_SECONDS):
            self._shown_at = now
            log.info("%s", self.line())

    def finish(self) -> None:
        """Log the last line, where :meth:`add` could not know that it was the last."""
        log.info("%s", self.line(finished=True))

    def line(self, finished: bool = False) -> str:
        """The state in words."""
        done, total = self._counts(self.before + self.added)
        how_far = (
            f"{done} / {total} {self.unit}" if total else f"{done} {self.unit} {'in all' if finished else 'so far'}"
        )
        parts = [f"{self.label}: {how_far}"]
        if not self.added:
            parts.append(f"waiting for {self.waits_for} ({time.monotonic() - self._started:.0f} s)")
            return ", ".join(parts)
        seconds = max(self.seconds, 1e-9)
        rate = self.added / seconds
        for unit, amount in {self.unit: self.added, **self._rates}.items():
            parts.append(f"{_rounded(amount / seconds)} {unit}/s")
        if self._text:
            parts.append(self._text)
        if self.total is not None and not finished:
            parts.append(f"{_duration((self.total - self.before - self.added) / rate)} left")
        return ", ".join(parts)

    @property
    def startup_seconds(self) -> float:
        """Time until the first was done."""
        first = self._started if self._first is None else self._first
        return round(first - self._started, 3)

    @property
    def seconds(self) -> float:
        """Time until the latest was done."""
        return round(self._latest - self._started, 3)

    def _counts(self, done: int) -> tuple[str, str]:
        return f"{done:,}", "" if self.total is None else f"{self.total:,}"

    def _log_until_stopped(self) -> None:
        shown = -1
        while not self._stop.wait(LOG_SECONDS):
            if self.added != shown or time.monotonic() - self._shown_at >= SILENT_SECONDS:
                shown, self._shown_at = self.added, time.monotonic()
                log.info("%s", self.line())


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
