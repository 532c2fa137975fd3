"""The guard around a tiny application: keys, host names, admission, bodies, depth of JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import httpx
import pytest

from notellm2_ray.core.settings.serve import LimitSettings
from notellm2_ray.serve.errors import InvalidError, MalformedError
from notellm2_ray.serve.figures import Figures, quantile, render, summary
from notellm2_ray.serve.http.guard import Guard, check_json
from notellm2_ray.serve.keys import KeyRing, create_key


class App:
    """An application that answers with the body's length, after waiting for ``hold``."""

    def __init__(self):
        self.hold = asyncio.Event()
        self.hold.set()

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        await self.hold.wait()
        if scope["path"] == "/broken":
            raise RuntimeError("secret of the inside")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})


def guarded(keys=None, most=4, **limits):
    app = App()
    guard = Guard(app, LimitSettings(**limits), most, keys, Figures("test"))
    return app, guard, httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1")


def error_of(answer):
    return answer.json()["error"]["type"]


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.json"
    made = {scope: create_key(path, scope, [scope]) for scope in ("read", "write")}
    return KeyRing(path), made


def test_a_key_and_its_scope_are_needed(keys):
    ring, made = keys

    async def run():
        _, _, client = guarded(ring)
        read = {"authorization": f"Bearer {made['read']}"}
        assert error_of(await client.get("/v1/stats")) == "unauthorized"
        assert error_of(await client.get("/v1/stats", headers={"x-api-key": "nl2_wrong"})) == "unauthorized"
        assert (await client.get("/v1/stats", headers=read)).status_code == 200
        assert (await client.get("/v1/stats", headers={"x-api-key": made["read"]})).status_code == 200
        assert error_of(await client.put("/v1/notes", headers=read, content=b"{}")) == "forbidden"
        assert error_of(await client.put("/v1/notes/", headers=read, content=b"{}")) == "forbidden"
        assert error_of(await client.post("/v1/events", headers=read, content=b"{}")) == "forbidden"
        write = {"authorization": f"Bearer {made['write']}"}
        assert (await client.post("/v1/events", headers=write, content=b"{}")).status_code == 200
        assert error_of(await client.get("/v1/stats", headers=write)) == "forbidden"
        for path in ("/", "/ui/app.js", "/v1/health", "/v1/ready"):
            assert (await client.get(path)).status_code == 200

    asyncio.run(run())


def test_without_keys_only_local_names_are_answered():
    async def run():
        _, _, client = guarded()
        for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "127.8.8.8"):
            assert (await client.get("/v1/stats", headers={"host": host})).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "[", ""):
            assert error_of(await client.get("/v1/stats", headers={"host": host})) == "forbidden"

    asyncio.run(run())


def test_a_body_is_refused_as_soon_as_it_is_too_long():
    async def run():
        _, guard, client = guarded(body_bytes=2000)
        assert error_of(await client.post("/x", content=b"a" * 2001)) == "too_large"
        sent = []

        async def chunks():
            for _ in range(100):
                sent.append(1)
                yield b"a" * 500

        assert error_of(await client.post("/x", content=chunks())) == "too_large"
        assert len(sent) <= 6, "the rest of an endless body was read"
        assert (await client.post("/x", content=b"a" * 2000)).text == "2000"
        lied = await client.post("/x", content=b"a", headers={"content-length": "1" * 30})
        assert error_of(lied) == "malformed_request"
        assert guard.body_bytes == 0 and guard.in_hand == 0

    asyncio.run(run())


def test_a_body_that_arrives_too_slowly_is_refused():
    async def run():
        _, guard, client = guarded(body_seconds=0.1)

        async def slowly():
            yield b"a"
            await asyncio.sleep(1)
            yield b"b"

        assert error_of(await client.post("/x", content=slowly())) == "timeout"
        assert guard.body_bytes == 0

    asyncio.run(run())


def test_one_request_too_many_is_refused_immediately_but_health_is_answered():
    async def run():
        app, _, client = guarded(most=3)
        app.hold.clear()
        waiting = [asyncio.create_task(client.post("/x", content=b"a")) for _ in range(3)]
        await asyncio.sleep(0.05)
        refused = await asyncio.wait_for(client.post("/x", content=b"a"), 1)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        health = asyncio.create_task(client.get("/v1/health"))
        app.hold.set()
        assert [(await one).status_code for one in [*waiting, health]] == [200] * 4

    asyncio.run(run())


def test_all_bodies_together_are_bounded():
    async def run():
        app, guard, client = guarded(most=10, body_bytes=2000, bodies_bytes=3000)
        app.hold.clear()
        first = asyncio.create_task(client.post("/x", content=b"a" * 2000))
        await asyncio.sleep(0.05)
        assert error_of(await client.post("/x", content=b"a" * 2000)) == "overloaded"
        app.hold.set()
        assert (await first).status_code == 200
        assert guard.body_bytes == 0

    asyncio.run(run())


def test_an_internal_error_reveals_nothing():
    async def run():
        _, _, client = guarded()
        answer = await client.get("/broken")
        assert answer.status_code == 500 and error_of(answer) == "internal" and "secret" not in answer.text

    asyncio.run(run())


def test_brackets_in_strings_do_not_count_as_depth():
    check_json(json.dumps({"a": "[" * 100, "b": 'q"\\"[[[['}).encode(), 4)
    check_json(b"[[[[1]]]]" * 10, 4)
    with pytest.raises(InvalidError, match="nested"):
        check_json(b"[" * 5, 4)
    with pytest.raises(InvalidError):
        check_json(b'{"a":' * 100_000, 16)
    check_json(b'"' + b"[" * 1000, 4)  # an unterminated string: the parser refuses it


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_another_encoding_is_refused(encoding):
    body = ("[" * 100 + "]" * 100).encode(encoding)
    assert json.loads(body)
    with pytest.raises(MalformedError, match="UTF-8"):
        check_json(body, 16)


@pytest.mark.parametrize("unit", [b"[],", b'\\"', b'"",', b"1,", b'"', b"{}"])
def test_checking_a_hostile_body_is_fast(unit):
    started = time.perf_counter()
    with contextlib.suppress(InvalidError):
        check_json(b'["' + unit * (8_000_000 // len(unit)), 16)
    with contextlib.suppress(InvalidError):
        check_json(b"[" + unit * (8_000_000 // len(unit)), 16)
    assert time.perf_counter() - started < 3


def test_too_many_values_are_refused():
    with pytest.raises(InvalidError, match="tokens"):
        check_json(b"[" + b"[]," * 600_000, 16)


def test_figures_of_two_replicas_become_one_page():
    replicas = [Figures("a"), Figures("b")]
    for figures in replicas:
        figures.answered("/v1/similar", 200, 0.0015)
        figures.took("search", 0.03)
        figures.batch("encoder", 3)
        figures.refused("overloaded")
        figures.fallback("budget")
        figures.state(notes=7)
    snapshots = [json.loads(json.dumps(figures.snapshot())) for figures in replicas]  # as sent between processes
    assert snapshots[0]
    found = summary([figures.snapshot() for figures in replicas])
    assert found["requests"] == {"/v1/similar 200": 2} and found["refused"] == {"overloaded": 2}
    assert found["stage_ms"]["search"]["count"] == 2 and 20 < found["stage_ms"]["search"]["p50"] <= 50
    text = render([figures.snapshot() for figures in replicas]).decode()
    assert text.count("# TYPE notellm2_stage_seconds histogram") == 1
    assert 'replica="a"' in text and 'what="notes"' in text and "} 7.0" in text


def test_quantiles_within_buckets():
    buckets = [(1.0, 5.0), (2.0, 10.0), (float("inf"), 10.0)]
    assert quantile(buckets, 0.5) == 1.0 and quantile(buckets, 0.75) == 1.5
    assert quantile([(1.0, 0.0), (float("inf"), 4.0)], 0.5) == 1.0
    assert quantile([], 0.5) == 0.0
