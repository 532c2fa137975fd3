"""Makes the tiny models that come with the package: ``python -m notellm2_ray.pipeline.packaged_models WORKSPACE``.

They are the tiny models of another world: more notes, another seed, longer training. Its notes, drawings and titles are
made by the same rules as the demo's but none of them is the same, as a real checkpoint has read other texts of one's
language. Weights are kept in bfloat16, so that every machine starts from the same numbers. It takes about an hour on
one core.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from notellm2_ray.core.config import build, shaping, to_plain
from notellm2_ray.core.run import read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.models.packaged import DIRECTORY

# Another world than the demo's: other notes, titles and drawings of the same kind, and longer training.
ELSEWHERE: dict[str, Any] = {
    "seed": 7,
    "source": {"kind": "world", "num_notes": 6000},
    "model": {"prompt_language": "en"},
    "tiny": {
        "llm_steps": 2400,
        "clip_steps": 400,
        "mllm_drawings": 8000,
        "mllm_preferences": 20_000,
        "mllm_steps": 3600,
    },
}
MADE = "made.json"


def main(workspace: str) -> None:
    """Train the models in a workspace of their own, and replace those of the package."""
    from notellm2_ray.pipeline import ranking_stages, recall_stages

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings: Settings = build(Settings, {**ELSEWHERE, "workspace": workspace})
    for work in (
        recall_stages.prepare,
        recall_stages.mine_pairs,
        recall_stages.build_tiny,
        ranking_stages.build_tiny_mllm,
    ):
        work(settings)
    publish(settings, DIRECTORY)


def publish(settings: Settings, directory: Path) -> None:
    """Copy the tiny models of a workspace to ``directory``, in bfloat16, with a record of how they were made."""
    from notellm2_ray.pipeline.stage import workspace_of

    workspace = workspace_of(settings)
    shutil.rmtree(directory, ignore_errors=True)
    for part, source in (
        ("llm", workspace.tiny_llm),
        ("vision", workspace.tiny_clip),
        ("mllm", workspace.tiny_mllm),
    ):
        shutil.copytree(source, directory / part, ignore=shutil.ignore_patterns("manifest.json", "partial.json"))
        _to_bfloat16(directory / part / "model.safetensors")
    counts = {**read_manifest(workspace.tiny)["counts"], "mllm": read_manifest(workspace.tiny_mllm)["counts"]}
    made: dict[str, Any] = {
        "seed": settings.seed,
        "source": to_plain(settings.source),
        "tiny": shaping(settings.tiny),
        "figures": counts,
    }
    (directory / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _to_bfloat16(path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = {name: one.to(torch.bfloat16) if one.is_floating_point() else one for name, one in tensors.items()}
    save_file(tensors, path, metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
