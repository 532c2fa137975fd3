"""API keys: 256 random bits each, with scopes; only their SHA-256 is stored.

A key is shown once, when it is created. A fast hash is enough, because random bits cannot be guessed; only passwords
need slow hashes. Digests are compared in constant time.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from notellm2_ray.core.errors import ConfigError

Scope = Literal["read", "write"]
SCOPES: tuple[Scope, ...] = ("read", "write")
PREFIX = "nl2_"
_RELOAD_SECONDS = 2.0
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


class Key(NamedTuple):
    """A key as stored."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    created: str


def digest(key: str) -> str:
    """The stored digest of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def create_key(path: Path, name: str, scopes: Iterable[str]) -> str:
    """Create a key, add its digest to the file and return the key, which cannot be shown again.

    Raises:
        ConfigError: the name is taken or not allowed, a scope is unknown, or the file is damaged.
    """
    scopes = tuple(dict.fromkeys(scopes))
    if not _NAME.fullmatch(name):
        raise ConfigError(f"key name {name!r}: 1 to 64 letters, digits, . _ @ - are needed")
    if not scopes or not set(scopes) <= set(SCOPES):
        raise ConfigError(f"scopes must be among {', '.join(SCOPES)}; got {', '.join(scopes) or 'none'}")
    keys = read_keys(path)
    if any(key.name == name for key in keys):
        raise ConfigError(f"{path} has a key called {name!r} already: revoke it first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    made = Key(name, digest(secret), scopes, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    _write(path, [*keys, made])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Remove a key; running services notice it within seconds.

    Raises:
        ConfigError: there is no key of that name.
    """
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        raise ConfigError(f"{path} has no key called {name!r}")
    _write(path, [key for key in keys if key.name != name])


def read_keys(path: Path) -> list[Key]:
    """All keys of a file; none if there is no file.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["keys"]
        return [Key(str(k["name"]), str(k["sha256"]), tuple(k["scopes"]), str(k["created"])) for k in listed]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of API keys, or is damaged ({error}): restore or delete it") from error


def _write(path: Path, keys: Iterable[Key]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump({"keys": [{**key._asdict(), "scopes": list(key.scopes)} for key in keys]}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class KeyRing:
    """The keys that a server accepts; it reads a changed file within seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: list[Key] = read_keys(path)
        self._stamp = self._file_stamp()
        self._next_look = 0.0

    def __len__(self) -> int:
        return len(self._keys)

    def verify(self, presented: str) -> Key | None:
        """The stored key that matches, or None. All stored keys are compared, even after a match."""
        self._reload()
        wanted, found = digest(presented), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found

    def _reload(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _RELOAD_SECONDS
        stamp = self._file_stamp()
        if stamp != self._stamp:
            with contextlib.suppress(ConfigError):  # if the file is damaged, the keys read before stay valid
                self._keys = read_keys(self.path)
            self._stamp = stamp

    def _file_stamp(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size
