"""A log line every few seconds while something long is under way."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

log = logging.getLogger("notellm2_ray")

LOG_SECONDS = 5.0
SILENT_SECONDS = 60.0  # after which it is said that nothing new got done


class Progress:
    """Counts notes and logs done / total, notes/s and the time left, from a thread of its own.

    Args:
        total: notes in all.
        before: notes that an earlier run did; they count as done but not into the rate.
        stage: the stage's name, as on the command line.
        unit: what is counted, in the plural.
        waits_for: what the first result is.
    """

    def __init__(
        self,
        total: int,
        before: int = 0,
        *,
        stage: str = "embed-notes",
        unit: str = "notes",
        waits_for: str = "the first block",
    ) -> None:
        self.total, self.before, self.added = total, before, 0
        self.stage, self.unit, self.waits_for = stage, unit, waits_for
        self.tokens = 0
        self.started = time.monotonic()
        self.first: float | None = None
        self.latest = self.started
        self._paused: float | None = None  # since when nothing could be done
        self._pauses = 0.0  # seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log_until_stopped, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self.before:
            log.info("%s: %d of %d %s are done already", self.stage, self.before, self.total, self.unit)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.added:
            log.info("%s", self.line())

    def add(self, notes: int, tokens: int = 0) -> None:
        """So many notes more are done; ``tokens`` were generated for them."""
        self.tokens += tokens
        self.latest = time.monotonic()
        self.first = self.latest if self.first is None else self.first
        if self._paused is not None:
            self._pauses += self.latest - self._paused
            self._paused = None
        self.added += notes

    def pause(self) -> None:
        """Something has to start anew: the time until more is done counts as start-up."""
        self._paused = time.monotonic()

    def line(self) -> str:
        """Where things stand, in words."""
        done = self.before + self.added
        now = time.monotonic()
        if not self.added:
            waited = f"waiting for {self.waits_for} ({now - self.started:.0f} s)"
            return f"{self.stage}: {done} / {self.total} {self.unit}, {waited}"
        seconds = max(self.latest - self.started, 1e-9)
        rate = self.added / seconds
        tokens = f", {self.tokens / seconds:.0f} tokens/s" if self.tokens else ""
        left = _duration((self.total - done) / rate)
        return f"{self.stage}: {done} / {self.total} {self.unit}, {rate:.3g} {self.unit}/s{tokens}, {left} left"

    def seconds(self) -> dict[str, float]:
        """Time until the first block was done and in pauses (start-up), and until the last was."""
        first = self.started if self.first is None else self.first
        return {
            "startup_seconds": round(first - self.started + self._pauses, 3),
            "embed_seconds": round(self.latest - self.started, 3),
        }

    def _log_until_stopped(self) -> None:
        shown, shown_at = -1, time.monotonic()
        while not self._stop.wait(LOG_SECONDS):
            if self.added != shown or time.monotonic() - shown_at >= SILENT_SECONDS:
                shown, shown_at = self.added, time.monotonic()
                log.info("%s", self.line())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
