"""Images are opened in one module, so that every stage applies the same orientation, background and limits."""

from __future__ import annotations

import ast
import base64
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import notellm2_ray
from notellm2_ray.baselines.ranking.sequential.features import _readable
from notellm2_ray.evaluate.pages import thumbnail
from notellm2_ray.infer.summary_rows import pixels_of
from notellm2_ray.models.embedder.preprocess import NotePreprocessor
from notellm2_ray.models.ranker.inputs import Question, RankerPrompter
from notellm2_ray.models.vision.pixels import ImageSettings
from tests.support.encoded_pictures import LOSSLESS

ROOT = Path(notellm2_ray.__file__).parent
OPENER = ROOT / "core" / "images.py"
# Functions of other libraries that read pictures: Pillow, OpenCV, torchvision, matplotlib, imageio and transformers.
READERS = {"imread", "imdecode", "read_image", "decode_image", "decode_jpeg", "load_image", "exif_transpose"}


def test_no_other_module_opens_images():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted(ROOT.rglob("*.py"))
        if path != OPENER
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _opens_an_image(node.func)
    ]
    assert not found, f"use notellm2_ray.core.images instead: {', '.join(found)}"


def _opens_an_image(function: ast.expr) -> bool:
    """Whether it is ``Image.open`` or its like; our own ``decode_image`` is called by its bare name."""
    if not isinstance(function, ast.Attribute):
        return False
    owner = ast.unparse(function.value)
    return function.attr in READERS or (function.attr == "open" and owner.rpartition(".")[2] in ("Image", "Images"))


def _embedder(data: bytes) -> np.ndarray:
    stand_in = SimpleNamespace(image=ImageSettings(32), variant=SimpleNamespace(sees_images=True))
    return NotePreprocessor._pixels(stand_in, SimpleNamespace(image=data), "multimodal")


def _ranker(data: bytes) -> np.ndarray:
    settings = SimpleNamespace(variant="mllm_msr", max_image_pixels=2000)
    return np.asarray(RankerPrompter.image(SimpleNamespace(settings=settings), Question("", data)))


STAGES = {
    "embedder": _embedder,
    "summaries": lambda data: np.asarray(pickle.loads(pickle.dumps(pixels_of(data, 2000)[0]))),
    "ranker": _ranker,
    "baseline": lambda data: next(_readable([("n", data)], ImageSettings(32)))[1],
    "report": lambda data: np.asarray(
        Image.open(io.BytesIO(base64.b64decode(thumbnail(data)[0].partition(",")[2])))
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["TIFF turned 6", "RGBA", "palette and hole", "grey of 16 bits", "CMYK TIFF"])
def test_every_stage_sees_that_picture(stage, name):
    assert np.array_equal(STAGES[stage](LOSSLESS[name]), STAGES[stage](LOSSLESS["PNG"]))
