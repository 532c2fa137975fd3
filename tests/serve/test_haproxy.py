"""Changes to Ray's HAProxy configuration: ports on loopback, and refusals before a request reaches a replica."""

from __future__ import annotations

import http.server
import socket
import subprocess
import threading

import httpx
import pytest

from notellm2_ray.core.settings.serve import DeploymentSettings, ServeSettings
from notellm2_ray.serve import haproxy
from tests.support.serving import free_port, wait_for

SETTINGS = ServeSettings(gateway=DeploymentSettings(max_ongoing=8, max_queued=4))  # 12 in all, 4 for the encoder
# The parts of Ray's own configuration that the rules change.
CONFIG = """\
defaults
    mode http
    timeout connect 2s
    timeout client 20s
    timeout server 20s
    errorfile 503 /dev/null
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_http-notellm2 path_beg /v1
    use_backend http-notellm2 if is_http-notellm2
    use_backend lost if {{ path /lost }}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend http-notellm2
    http-reuse always
    server one 127.0.0.1:{upstream}
backend lost
    server none 127.0.0.1:{nobody}
"""


def test_statistics_and_metrics_ports_are_bound_to_loopback(tmp_path, monkeypatch):
    monkeypatch.setattr(haproxy, "real_binary", lambda: "/bin/echo")
    config = tmp_path / "haproxy.cfg"
    binds = [":9101", "*:8404", "127.0.0.1:8000", ":80"]
    config.write_text("frontend some\n" + "".join(f"    bind {one}\n" for one in binds))
    script = haproxy.write_script(tmp_path / "haproxy", ["9101", "8404"], SETTINGS)
    done = subprocess.run([script, "-db", "-f", config, "-dR"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-db", "-f", str(config), "-dR"]
    lines = [line.strip() for line in config.read_text().splitlines() if "bind" in line]
    assert lines == ["bind 127.0.0.1:9101", "bind 127.0.0.1:8404", "bind 127.0.0.1:8000", "bind :80"]
    assert "nl2_" not in config.read_text()  # there is no backend yet


def test_a_port_in_use_is_replaced():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert haproxy.free_port(port) != str(port)


def test_two_services_on_a_machine_use_different_replica_ports(tmp_path, monkeypatch):
    monkeypatch.setattr(haproxy, "real_binary", lambda: "/bin/echo")
    ranges = []
    for port in (8000, 8001, 9000):
        (tmp_path / str(port)).mkdir()
        environment = haproxy.serve_environment(ServeSettings(port=port), tmp_path / str(port))
        names = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
        least, most = (int(environment[name]) for name in names)
        assert 1024 < least < most < 32768  # below Linux's ports for clients
        ranges.append(range(least, most + 1))
    assert len(set().union(*ranges)) == sum(map(len, ranges))


@pytest.fixture
def proxied(tmp_path):
    """A real HAProxy in front of a server that answers when released: its address, arrivals, and the release."""
    let, arrived = threading.Event(), []

    class Slow(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path != "/v1/health":
                arrived.append(self.path)
                let.wait(20)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    port, config = free_port(), tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port, upstream=upstream.server_address[1], nobody=free_port()))
    script = haproxy.write_script(tmp_path / "haproxy", ["9101"], SETTINGS)
    process = subprocess.Popen([script, "-db", "-f", config], stderr=subprocess.PIPE)
    try:
        wait_for(lambda: _listens(port) or process.poll() is not None)
        assert process.poll() is None, process.stderr.read().decode()
        yield f"http://127.0.0.1:{port}", arrived, let
    finally:
        let.set()
        process.kill()
        process.wait()
        process.stderr.close()
        upstream.shutdown()
        upstream.server_close()


def test_requests_for_which_replicas_have_no_room_are_refused_by_haproxy(proxied):
    address, arrived, let = proxied
    answers: dict[str, list[int]] = {"/v1/embeddings": [], "/v1/similar": []}
    with httpx.Client(base_url=address, trust_env=False, timeout=30) as http:
        waiting = []

        def ask(path: str) -> None:
            answers[path].append(httpx.post(f"{address}{path}", content=b"{}", trust_env=False, timeout=30).status_code)

        def hold(path: str, count: int) -> None:
            for _ in range(count):
                waiting.append(threading.Thread(target=ask, args=(path,)))
                waiting[-1].start()
            wait_for(lambda: arrived.count(path) == count)

        hold("/v1/embeddings", 4)
        refused = http.post("/v1/embeddings", content=b"{}")
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["content-type"] == "application/json"
        hold("/v1/similar", 8)  # requests to the encoder left room for others
        assert http.post("/v1/similar", content=b"{}").status_code == 429
        assert http.post("/v1/health").status_code == 200
        let.set()
        for thread in waiting:
            thread.join()
        assert set(answers["/v1/embeddings"]) == set(answers["/v1/similar"]) == {200}
        assert http.post("/v1/embeddings").status_code == 200  # there is room again


def test_haproxys_own_errors_are_those_of_the_api(proxied):
    address, _, _ = proxied
    for path, message in (("/lost", "died"), ("/nothing", "not started yet")):
        answer = httpx.get(f"{address}{path}", trust_env=False)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["type"] == "unavailable"
        assert message in answer.json()["error"]["message"]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
