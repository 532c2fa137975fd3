"""The tiny models that come with the package, so that a first run trains only what the two papers train.

They play the part of real checkpoints. They were trained on the notes and drawings of another synthetic world, by
:mod:`notellm2_ray.pipeline.packaged_models`, and know nothing about any note, user or click of yours.
"""

from __future__ import annotations

from pathlib import Path

PACKAGED = "packaged"
DIRECTORY = Path(__file__).with_name("checkpoints")


def located(name: str, part: str) -> str:
    """``name``; for ``packaged`` the directory of that model.

    Args:
        part: ``llm``, ``vision`` or ``mllm``.
    """
    return str(DIRECTORY / part) if name == PACKAGED else name
