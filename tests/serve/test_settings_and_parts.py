"""The typed builder, the configuration files, the doctor and small checks."""

from __future__ import annotations

import ast
import asyncio
import inspect
import socket
import threading

import pytest
import yaml
from pydantic import ValidationError

from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.settings.serve import LimitSettings
from notellm2_ray.serve import doctor
from notellm2_ray.serve.errors import OverloadedError, TookTooLongError
from notellm2_ray.serve.http import checks, schemas
from tests.support import ROOT

CONFIGS = ROOT / "serve_configs"


def test_the_builders_module_evaluates_its_annotations():
    """If a builder's annotation is a string, Ray passes it a plain dict, and a misspelt key is not noticed."""
    from notellm2_ray.online import wiring as online

    assert inspect.get_annotations(online.build_app)["args"] is online.ServeArguments
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(online))) if isinstance(node, ast.ImportFrom)]
    assert all(node.module != "__future__" for node in imports)


@pytest.mark.slow
def test_a_misspelt_key_is_an_error_through_rays_own_builder_call():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    from notellm2_ray.online.wiring import build_app

    with pytest.raises(ValueError, match="presett"):
        call(build_app, {"presett": "demo"})
    with pytest.raises(ConfigError, match="did you mean"):
        call(build_app, {"preset": "demo", "overrides": ["serve.gateway.replica=2"]})


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_configuration_files_name_existing_settings(path):
    from notellm2_ray.online.wiring import ServeArguments
    from notellm2_ray.presets import load_settings

    documents = [one for one in yaml.safe_load_all(path.read_text()) if one]
    for document in documents:
        inner = document
        if document.get("kind") == "RayService":
            inner = yaml.safe_load(document["spec"]["serveConfigV2"])
        if "applications" not in inner:
            continue
        (application,) = inner["applications"]
        assert application["import_path"] == "notellm2_ray.online.wiring:build_app"
        arguments = ServeArguments.model_validate(application["args"])
        settings = load_settings(None, arguments.preset, arguments.overrides)  # without the user's config file
        assert settings.serve.port == inner["http_options"]["port"]
        assert settings.serve.host == inner["http_options"]["host"]


def test_the_doctor_finds_sockets_that_other_machines_can_reach():
    with socket.socket() as inner, socket.socket() as outer:
        for one, address in ((inner, "127.0.0.1"), (outer, "0.0.0.0")):
            one.bind((address, 0))
            one.listen()
        import os

        port = outer.getsockname()[1]
        finding = doctor.examine(os.getpid(), service_port=port)
        assert port in [one.port for one in finding.listeners]
        assert inner.getsockname()[1] not in [one.port for one in finding.listeners]
        with pytest.raises(ConfigError, match="without API keys"):
            doctor.check(finding)
        assert doctor.check(doctor.examine(os.getpid(), port, service_keys=True)._replace(problems=[])) is None
        assert "0.0.0.0" in doctor.report(finding)


def test_loopback_addresses():
    assert all(map(doctor.is_loopback, ["127.0.0.1", "::1", "::ffff:127.0.0.1"]))
    assert not any(map(doctor.is_loopback, ["::", "0.0.0.0", "10.0.0.1", "::ffff:10.0.0.1"]))


def prepare(limits=None, **fields):
    limits = limits or LimitSettings()
    note = schemas.Note(note_id="a", **fields)
    return asyncio.run(checks.prepare_note(note, limits, None, checks.Images(limits)))


def bomb():
    """A small file of 40 megapixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (8001 * 5000), 9)
    header = struct.pack(">IIBBBBB", 8000, 5000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_are_checked_before_they_are_decoded():
    import base64

    data = bomb()
    assert len(data) < 100_000
    with pytest.raises(DataError, match="megapixels"):
        prepare(image=base64.b64encode(data).decode())
    for text in ("not base64!", "data:image/png;base64,AAAA", base64.b64encode(b"plain").decode(), ""):
        with pytest.raises(DataError, match="image"):
            prepare(image=text)
    with pytest.raises(DataError, match="bytes"):
        prepare(LimitSettings(image_bytes=1024), image="A" * 5000)


class Decoder(checks.Images):
    """Checks images once it is released."""

    def __init__(self, **arguments):
        super().__init__(LimitSettings(), **arguments)
        self.go, self.looked_at = threading.Event(), 0

    def _check(self, image):
        self.looked_at += 1
        self.go.wait(10)


def prepare_all(images, count):
    notes = [schemas.Note(note_id=f"n{row}", image="AAAA") for row in range(count)]
    return checks.prepare_notes(notes, LimitSettings(), None, images)


def test_too_many_images_in_hand_are_refused_but_texts_are_not():
    async def run():
        images = Decoder(most=4)
        first = asyncio.create_task(prepare_all(images, 6))  # there are no others: always accepted
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await prepare_all(images, 1)
        texts, problems = await checks.prepare_notes([schemas.Note(note_id="t")], LimitSettings(), None, images)
        assert [note.note_id for note in texts] == ["t"] and not problems
        images.go.set()
        assert len((await first)[0]) == 6
        assert len((await prepare_all(images, 4))[0]) == 4 and images.in_hand == 0

    asyncio.run(run())


def test_images_that_take_too_long_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "PREPARE_SECONDS", 0.1)

    async def run():
        images = Decoder()
        with pytest.raises(TookTooLongError) as caught:
            await prepare_all(images, 3)
        assert caught.value.status == 503 and "retry-after" in caught.value.headers
        images.go.set()
        images.threads.shutdown(wait=True)
        assert (images.looked_at, images.in_hand) == (1, 0), "what nobody waits for any more was decoded"

    asyncio.run(run())


def test_times_of_requests_are_read_as_those_of_tables():
    shapes = ("2024-06-01T20:30:59+08:00", 1_717_245_059, 1_717_245_059_000, "1717245059")
    assert len({schemas.Note(note_id="a", created_at=shape).created_at for shape in shapes}) == 1
    for refused in ("2024-06-01T12:30:59", 20240601, 12345, "soon"):
        with pytest.raises(ValidationError, match="time zone|outside the years|not a time"):
            schemas.Note(note_id="a", created_at=refused)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00"])
def test_a_time_that_its_zone_shifts_out_of_range_is_refused(text):
    with pytest.raises(ValidationError, match="year"):
        schemas.Note(note_id="a", created_at=text)


@pytest.mark.parametrize(
    "fields", [{"title": "x" * 3000}, {"topics": ["a"] * 101}, {"topics": [""]}, {"content": "x" * 200_000}]
)
def test_notes_beyond_the_limits_are_refused(fields):
    with pytest.raises(DataError):
        prepare(**fields)
