"""The sockets of the service and of Ray that other machines can reach, and their guards (`notellm2 doctor`)."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.errors import ConfigError

_RAY = ("raylet", "gcs_server", "ray::", "dashboard", "plasma", "ray/_private", "ray/autoscaler", "haproxy")
# No password whatever RAY_AUTH_MODE says: only metrics and statistics, but they reveal what runs here.
_UNGUARDED = ("haproxy",)

_MODE = "RAY_AUTH_MODE"


class Listener(NamedTuple):
    """A listening TCP socket."""

    address: str
    port: int
    pid: int
    process: str  # name without arguments, which may contain secrets
    kind: str  # "ray" (Ray's protocols, guarded by RAY_AUTH_MODE=token), "haproxy", "service" or "other"
    token: bool  # whether its process requires Ray's token

    def __str__(self) -> str:
        return f"{self.address}:{self.port}  {self.process} (process {self.pid}, {self.kind})"


class Finding(NamedTuple):
    """The result of an examination."""

    listeners: list[Listener]  # reachable from other machines
    problems: list[str]


def examine(root: int | None = None, service_port: int | None = None, service_keys: bool = False) -> Finding:
    """Examine the sockets of a process and its children, or of all Ray processes of this user.

    Args:
        root: id of the process; None: all Ray processes of this user on this machine.
        service_port: port of the service's own API.
        service_keys: whether that API requires keys.
    """
    listeners = [one for one in listening(root, service_port) if not is_loopback(one.address)]
    problems = [problem] if (problem := token_problem()) else []
    for one in listeners:
        if one.kind == "ray" and not one.token:
            problems.append(f"{one}: who reaches it can run code here; set RAY_AUTH_MODE=token before Ray starts")
        elif one.kind == "haproxy":
            problems.append(
                f"{one}: no password is needed; start the service with `notellm2 serve`, which binds it to loopback"
            )
        elif one.kind == "service" and not service_keys:
            problems.append(f"{one}: other machines reach the service without API keys")
    return Finding(listeners, problems)


def check(finding: Finding) -> None:
    """Stop if there is a problem.

    Raises:
        ConfigError: names every problem.
    """
    if finding.problems:
        raise ConfigError("unguarded sockets that other machines can reach:\n" + "\n".join(finding.problems))


def report(finding: Finding) -> str:
    """A finding as text."""
    lines = ["Sockets that other machines can reach:"]
    for one in finding.listeners:
        guard = "requires Ray's token" if one.kind == "ray" and one.token else ""
        lines.append(f"  {one} {guard}".rstrip())
    if not finding.listeners:
        lines.append("  none")
    return "\n".join([*lines, *(f"PROBLEM {one}" for one in finding.problems)])


def listening(root: int | None, service_port: int | None) -> Iterator[Listener]:
    """All listening TCP sockets of the processes."""
    import psutil

    for process in _processes(root):
        try:
            command = " ".join(process.cmdline()[:4])
            sockets = process.net_connections("tcp")
            name, token = process.name(), asks_for_token(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN:
                kind = "service" if one.laddr.port == service_port else _kind(name, command)
                yield Listener(one.laddr.ip, one.laddr.port, process.pid, name, kind, token)


def _processes(root: int | None) -> Iterable[Any]:
    import psutil

    if root is not None:
        top = psutil.Process(root)
        return [top, *top.children(recursive=True)]
    found = []
    for process in psutil.process_iter(["username"]):
        try:
            if process.uids().real == os.getuid() and _kind(process.name(), " ".join(process.cmdline()[:4])) != "other":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _kind(name: str, command: str) -> str:
    if any(one in name for one in _UNGUARDED):
        return "haproxy"
    return "ray" if any(one in command or one in name for one in _RAY) else "other"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def asks_for_token(process: Any) -> bool:
    """Whether a Ray process refuses clients without its token.

    Read from the process's environment, which Ray sets at its start. A worker's process title overwrites that memory;
    then the raylet above it is asked.
    """
    import psutil

    try:
        for one in (process, *process.parents()):
            mode = os.environ.get(_MODE) if one.pid == os.getpid() else one.environ().get(_MODE)
            if mode:
                return mode.lower() == "token"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return False


def token_problem() -> str | None:
    """Why other users of this machine could know Ray's token; None if they cannot."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        mode, home = path.stat().st_mode, path.parent.parent.stat().st_mode
    except OSError:
        return None
    if mode & 0o077 and home & 0o011:
        return f"{path} can be read by other users of this machine: chmod 600 it"
    return None
