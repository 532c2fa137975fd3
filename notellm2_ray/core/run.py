"""Output directories that are complete or absent, and named random streams.

A stage writes into its directory, and ``manifest.json`` last. The manifest records the settings that shaped the output
and the fingerprints of its inputs, so that a later run can tell whether the output is there already or was made from
something else. Until then the directory holds ``partial.json`` instead. If that has the same fingerprint, an earlier
run was stopped and can be continued.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import MissingOutputError, OutputError

MANIFEST = "manifest.json"
PARTIAL = "partial.json"


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-serialisable values (16 hex digits)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_fingerprint(name: str) -> str:
    """A fingerprint of the names, sizes and times of a model's files, so that no weights need to be read.

    For a name that is neither a directory nor a file, such as one on the hub, it is the fingerprint of the name.
    """
    path = Path(name)
    if not path.exists():
        return fingerprint(name)
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return fingerprint([(str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns) for one in files])


def stream_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the random stream called ``names``, independent of every other stream of ``seed``."""
    text = json.dumps([seed, *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file such that readers see either the old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a finished output.

    Raises:
        MissingOutputError: the directory holds no finished output.
        OutputError: its manifest is damaged.
    """
    path = Path(directory) / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{directory} holds no finished output ({MANIFEST} is missing): run its stage first"
        raise MissingOutputError(message, directory) from None
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}): delete {directory} and run its stage again") from error


@dataclass
class Output:
    """One stage's output directory.

    Attributes:
        directory: its path.
        stage: the stage's name, as on the command line.
        settings: those that shape the output, as JSON values.
        inputs: name of each input -> its fingerprint.
    """

    directory: Path
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage, self.settings, dict(self.inputs))

    @property
    def complete(self) -> bool:
        """Whether the directory already holds exactly this output."""
        path = self.directory / MANIFEST
        return path.exists() and read_manifest(self.directory).get("fingerprint") == self.fingerprint

    @property
    def resumable(self) -> bool:
        """Whether an earlier run that makes this output was stopped here, and can be continued."""
        path = self.directory / PARTIAL
        try:
            return json.loads(path.read_text(encoding="utf-8")).get("fingerprint") == self.fingerprint
        except (FileNotFoundError, ValueError):
            return False

    @contextmanager
    def write(self) -> Iterator[dict[str, Any]]:
        """Prepare the directory, yield a dict for the manifest's counts, and write the manifest at the end.

        Files of a stopped run of the same fingerprint are kept; another output is removed. A directory that this
        program did not write is refused.

        Raises:
            OutputError: this program did not write the directory, or the disk is full or read-only.
        """
        started = time.time()
        counts: dict[str, Any] = {}
        try:
            self._make_ready()
            yield counts
            manifest = {
                "stage": self.stage,
                "fingerprint": self.fingerprint,
                "settings": dict(self.settings),
                "inputs": dict(self.inputs),
                "counts": counts,
                "seconds": round(time.time() - started, 3),
            }
            write_atomically(self.directory / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False, default=str))
            (self.directory / PARTIAL).unlink(missing_ok=True)
        except OSError as error:
            raise _disk_error(error, self.directory) from error

    def _make_ready(self) -> None:
        if self.directory.exists() and not self.resumable:
            entries = [entry.name for entry in self.directory.iterdir()]
            if entries and MANIFEST not in entries and PARTIAL not in entries:
                raise OutputError(
                    f"{self.directory} is not empty and was not written by this program: "
                    "choose another directory or empty it yourself"
                )
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / PARTIAL, json.dumps({"fingerprint": self.fingerprint}))


def _disk_error(error: OSError, directory: Path) -> OSError | OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no space left while writing {directory}: free some and run the same command again, it continues"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return OutputError(f"cannot write {directory}: {error.strerror}; choose another workspace")
    return error
