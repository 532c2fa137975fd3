"""The log of finished preference steps: append-only files of JSON lines, one file per actor process, and an index.

A step is finished when its line is on disk. Many steps share one fsync, which costs the same for one as for hundreds.
Only one process ever writes to a file, so a line that a kill cut short is always the last line of its file.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("notellm2_ray")


class LogWriter:
    """Appends records to a file of its own in ``directory``. For one event loop."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"log-{uuid.uuid4().hex[:12]}.jsonl"
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - open as long as its actor lives
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def append(self, record: dict[str, Any]) -> None:
        """Append a record; returns when it is on disk.

        Raises:
            OSError: it could not be written.
        """
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _ in group))
            except OSError as error:
                for _, done in group:
                    done.set_exception(error)
                continue
            for _, done in group:
                done.set_result(None)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fdatasync(self._file.fileno())


class _Place(NamedTuple):
    file: int
    offset: int
    size: int


class LogIndex:
    """Where each record is in the logs, by its key; of several records with one key the first counts.

    It takes about 200 bytes of memory per record.

    Args:
        directory: of the logs; it need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records = 0  # lines read, repeated keys included
        self._places: dict[str, _Place] = {}
        self._files: list[Path] = []
        self._read_to: dict[Path, int] = {}
        self.refresh()

    def refresh(self) -> int:
        """Read what was appended since the last time; returns the number of new keys."""
        before = len(self._places)
        for path in sorted(self.directory.glob("log-*.jsonl")):
            if path not in self._read_to:
                self._files.append(path)
                self._read_to[path] = 0
            self._read(path)
        return len(self._places) - before

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        place = self._places[key]
        with open(self._files[place.file], "rb") as file:
            file.seek(place.offset)
            return json.loads(file.read(place.size))

    def read(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        """The records of ``keys``, in their order; each file is opened once."""
        files = [open(path, "rb") for path in self._files]  # noqa: SIM115
        try:
            for key in keys:
                place = self._places[key]
                files[place.file].seek(place.offset)
                yield json.loads(files[place.file].read(place.size))
        finally:
            for file in files:
                file.close()

    def _read(self, path: Path) -> None:
        number = self._files.index(path)
        offset = self._read_to[path]
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # cut short by a kill, or still being written
                    break
                self._take(number, offset, line, path)
                offset += len(line)
        self._read_to[path] = offset

    def _take(self, number: int, offset: int, line: bytes, path: Path) -> None:
        try:
            key = json.loads(line)["key"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s: the line at byte %d is damaged; its preference is made again", path, offset)
            return
        self.records += 1
        self._places.setdefault(key, _Place(number, offset, len(line)))
