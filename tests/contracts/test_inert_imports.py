"""Importing does nothing: no heavy library, no file, no socket, no environment variable, no thread, no process.

All modules are imported in one fresh interpreter, the light ones first, under an audit hook that sees what they do.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import notellm2_ray

# Only the modules that use torch import it; it takes seconds.
ABOUT_TORCH = (
    "notellm2_ray.models",
    "notellm2_ray.train",
    "notellm2_ray.infer",
    "notellm2_ray.evaluate.saliency",
    "notellm2_ray.baselines.ranking.sequential",
)
NEVER = ("ray", "vllm", "deepspeed", "faiss", "lance", "matplotlib", "bm25s")
HEAVY = (*NEVER, "torch", "transformers", "torchvision", "scipy")

PROBE = r"""
import importlib, json, os, sys, threading
light, about_torch, heavy = json.loads(sys.argv[1])
import numpy, pyarrow.dataset, pydantic  # libraries that light modules may use; numpy sets a variable and resets it
writes, seen = [], {"on": True}

def hook(event, arguments):
    if not seen["on"]:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            writes.append(f"open {path}")
    elif event in ("socket.connect", "socket.bind", "os.mkdir", "os.remove", "os.rename", "os.symlink",
                   "subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.putenv", "os.unsetenv"):
        writes.append(f"{event} {arguments}")

sys.addaudithook(hook)
report = {}
for name in light:
    importlib.import_module(name)
    report[name] = [one for one in heavy if one in sys.modules]
report["did"] = list(writes)
report["threads"] = threading.active_count()
seen["on"] = False  # the side effects of torch and transformers do not count, only the libraries that are imported
for name in about_torch:
    importlib.import_module(name)
report["after"] = [one for one in heavy if one in sys.modules]
report["cuda"] = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
print(json.dumps(report))
"""


def _module_names() -> tuple[list[str], list[str]]:
    found = pkgutil.walk_packages([str(Path(notellm2_ray.__file__).parent)], "notellm2_ray.")
    names = ["notellm2_ray", *sorted(module.name for module in found)]
    about_torch = [name for name in names if name.startswith(ABOUT_TORCH)]
    return [name for name in names if name not in about_torch], about_torch


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    light, about_torch = _module_names()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(Path(notellm2_ray.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([light, about_torch, HEAVY])],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "light": light, "home": home}


def test_light_modules_import_no_heavy_library(report):
    first = {}  # a library stays loaded, so only the first module that imports it is named
    for name in report["light"]:
        for library in report[name]:
            first.setdefault(library, name)
    assert first == {}


def test_the_package_itself_imports_only_the_standard_library(report):
    assert report["light"][0] == "notellm2_ray"
    assert report["notellm2_ray"] == []
    code = "import sys, notellm2_ray; print([name for name in ('numpy', 'pyarrow', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_come_from_their_modules():
    from notellm2_ray import Note, NoteEncoder
    from notellm2_ray.core.schema import Note as Home
    from notellm2_ray.models.embedder.encoder import NoteEncoder as EncoderHome

    assert (Note, NoteEncoder) == (Home, EncoderHome)
    assert {"Note", "NoteEncoder"} <= set(dir(notellm2_ray))
    with pytest.raises(AttributeError, match="no attribute 'NoteDecoder'"):
        notellm2_ray.NoteDecoder  # noqa: B018


def test_importing_has_no_side_effects(report):
    assert report["did"] == []
    assert report["threads"] == 1
    assert list(report["home"].iterdir()) == []


def test_no_module_imports_ray_or_another_engine(report):
    assert [library for library in report["after"] if library in NEVER] == []
    assert report["cuda"] is False
