"""Hostile bodies and images against the running service: no untyped answer, no 500, none late, memory bounded.

    python benchmarks/serve_fuzz.py [--bodies 8000] [--images 2000] [--url http://127.0.0.1:8000 --pid PID]

Bodies are valid ones that were damaged: parts are removed, doubled, nested, too long, of another type, not Unicode, or
cut off. Images are real ones with changed bytes, headers that promise gigapixels, other formats, or noise. Without
--url the script starts a small service of its own. Schemathesis finds faults against the OpenAPI document:

    uvx schemathesis run http://127.0.0.1:8000/openapi.json --checks not_a_server_error
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import random
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

LATE = 10.0  # seconds
MAX_GROWTH_MB = 200  # of all processes together, after the first tenth of the requests

VALID: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("PUT", "/v1/notes", {"notes": [{"note_id": "f1", "title": "a", "topics": ["b"], "content": "c"}]}),
    ("POST", "/v1/notes/delete", {"note_ids": ["f1"]}),
    ("POST", "/v1/notes/search", {"text": "green", "limit": 3}),
    ("POST", "/v1/embeddings", {"input": ["a"], "encoding_format": "float"}),
    ("POST", "/v1/similar", {"note_id": "n1", "k": 5, "filter": {"topics_any": ["red"], "exclude": ["n2"]}}),
    ("POST", "/v1/similar", {"note": {"note_id": "q", "title": "green"}, "k": 5, "explain": True}),
    ("POST", "/v1/events", {"events": [{"event_id": "e", "user_id": "u", "note_id": "n1", "action": "click"}]}),
    ("POST", "/v1/recommend", {"user_id": "u", "k": 3}),
    ("POST", "/v1/recommend", {"history": ["n1", "n2"], "k": 3, "budget_ms": 100}),
)
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, 1e308, "", " ", "\x00", "\ud800", "𝕏" * 50, "a" * 100_000, "../../etc/passwd",
    "' OR 1=1 --", "<script>alert(1)</script>", "{{7*7}}", "%s%n", "\u202e", "<|im_end|>", [], {}, [[]], {"": {}},
    "NaN", "2026-13-45T99:99:99Z", "0001-01-01T00:00:00Z", ["a"] * 5000, "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
)  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy with one thing wrong somewhere."""
    if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(STRANGE)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return rng.choice((value + value, [*value[:at], mutate(value[at], rng), *value[at + 1 :]], value * 2000))
    key = rng.choice(list(value))
    kind = rng.random()
    if kind < 0.15:
        return {name: one for name, one in value.items() if name != key}
    if kind < 0.25:
        return {**value, rng.choice(("__proto__", "note_ids", "k", "image_url", "x" * 5000)): rng.choice(STRANGE)}
    return {**value, key: mutate(value[key], rng)}


def body_of(value: Any, rng: random.Random) -> bytes:
    """The value as JSON, sometimes broken."""
    text = json.dumps(value).encode()
    kind = rng.random()
    if kind < 0.05:
        return text[: rng.randrange(len(text) + 1)]
    if kind < 0.1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    if kind < 0.12:
        return b"[" * rng.randrange(1, 100_000)
    return text


def images(rng: random.Random) -> Iterator[bytes]:
    """Endless images, most of them damaged or of a false size."""
    from PIL import Image

    whole = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, kind)
        whole.append(buffer.getvalue())
    while True:
        data = bytearray(rng.choice(whole))
        fate = rng.random()
        if fate < 0.5:
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif fate < 0.7:
            data = data[: rng.randrange(len(data))]
        elif fate < 0.8:
            data = bytearray(bomb(rng.choice((1000, 20_000, 60_000))))
        elif fate < 0.9:
            data = bytearray(rng.randbytes(rng.randrange(5000)))
        yield bytes(data)


def bomb(side: int) -> bytes:
    """A small PNG file that declares ``side`` x ``side`` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00" * ((side // 8 + 1) * min(side, 4000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def requests(options: argparse.Namespace, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    for _ in range(options.bodies):
        method, path, body = rng.choice(VALID)
        yield method, path, body_of(mutate(body, rng), rng)
    source = images(rng)
    for number in range(options.images):
        note = {"note_id": f"picture{number % 50}", "title": "x", "image": base64.b64encode(next(source)).decode()}
        method, path, body = rng.choice(
            (("PUT", "/v1/notes", {"notes": [note]}), ("POST", "/v1/similar", {"note": note}))
        )
        yield method, path, json.dumps(body).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=8000)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a running service without keys; none: one is started")
    parser.add_argument("--pid", type=int, help="of that service, for its memory")
    options = parser.parse_args()
    if options.url:
        sys.exit(fuzz(options.url, options.pid, options))
    from _service import Service, make_world

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        service = Service(make_world(base / "world").spec("serving"), base)
        try:
            status = fuzz(str(service.http.base_url), service.process.pid, options)
        finally:
            service.stop()
    sys.exit(status)


def fuzz(url: str, pid: int | None, options: argparse.Namespace) -> int:
    """Send everything and print what came back; 1 if anything is wrong, else 0."""
    rng = random.Random(options.seed)
    statuses: collections.Counter[int] = collections.Counter()
    untyped, late, broken, sizes = [], [], [], []
    total = options.bodies + options.images
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for number, (method, path, body) in enumerate(requests(options, rng)):
            began = time.perf_counter()
            try:
                answer = http.request(method, path, content=body, headers={"content-type": "application/json"})
            except httpx.HTTPError as error:
                broken.append(f"{path}: {type(error).__name__}")
                continue
            if time.perf_counter() - began > LATE:
                late.append(path)
            statuses[answer.status_code] += 1
            if answer.status_code >= 400 and "error" not in _json(answer):
                untyped.append(f"{path}: {answer.status_code} {answer.text[:80]}")
            if answer.status_code >= 500 and answer.status_code != 503:
                print(f"  {answer.status_code} {method} {path} {body[:200]!r}: {answer.text[:200]}")
            if pid and number % max(1, total // 20) == 0:
                sizes.append(memory_mb(pid))
        alive = http.get("/v1/ready").json()
    errors = sum(count for status, count in statuses.items() if status >= 500 and status != 503)
    print(f"{total} requests: " + ", ".join(f"{status} {count}" for status, count in sorted(statuses.items())))
    print(f"{errors} server errors, {len(untyped)} untyped errors {untyped[:3]}, {len(late)} later than {LATE:g} s, "
          f"{len(broken)} broken connections {broken[:3]}; ready afterwards: {alive['ready']}")  # fmt: skip
    growth = 0.0
    if sizes:
        growth = max(sizes[-3:]) - sizes[2]
        print(f"memory of all processes: {sizes[0]:.0f} MB at first, {sizes[2]:.0f} after a tenth, {sizes[-1]:.0f} at "
              f"the end (bound: {MAX_GROWTH_MB} MB of growth after a tenth)")  # fmt: skip
    return int(bool(errors or untyped or late or broken or not alive["ready"] or growth > MAX_GROWTH_MB))


def memory_mb(pid: int) -> float:
    """Memory that a process and its descendants share with no other, in MB."""
    found = 0
    for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            found += one.memory_full_info().uss
        except psutil.Error:
            continue
    return found / 2**20


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return {}


if __name__ == "__main__":
    main()
