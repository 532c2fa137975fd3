"""Training a multimodal LLM as embedder on two ranks of which one has no image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import architectures, tiny_models
from tests.support import embedder_training as material
from tests.support.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "zero3": {"engine": "deepspeed", "zero_stage": 3, "gradient_checkpointing": True},
}


def _steps(llm: str, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps: in the first, rank 1 has no image, in the second rank 0."""
    from notellm2_ray.core.settings.model import ModelSettings
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.train.distributed import mean_over_ranks, rank
    from notellm2_ray.train.engines import make_engine
    from notellm2_ray.train.objectives import loss_of
    from notellm2_ray.train.step import EmbedderStep

    model = ModelSettings(kind="mllm", llm=llm, embedding_dim=16, max_body_tokens=400)
    settings = material.train_settings(num_workers=2, **case)
    encoder = build_encoder(model, 1, llm_path=llm, vision_path="")
    encoder.model.set_gradient_checkpointing(settings.gradient_checkpointing)
    module = EmbedderStep(encoder.model, loss=loss_of(model, settings), bf16=False)
    module.train()
    engine = make_engine(module, settings, torch.device("cpu"))
    losses = []
    for step in range(2):
        shown = tiny_models.notes(4, without_image=range(4) if rank() != step else [1])
        features = [encoder.preprocessor.features(note) for note in shown]
        out = engine([encoder.preprocessor.collate(features)], torch.arange(4), torch.arange(4) + 10 * rank())
        engine.update(out.loss, 1.0)
        losses.append(mean_over_ranks(out.loss))
    return {"losses": losses, "weights": {k: v.clone() for k, v in (engine.state_dict() or {}).items()}}


def _all_cases(directory: str) -> dict[str, Any]:
    return {f"{kind} {name}": _steps(f"{directory}/{kind}", case) for kind in KINDS for name, case in CASES.items()}


KINDS = ("qwen3_vl", "llava")


@pytest.mark.slow
def test_ranks_without_images_do_not_hang_and_engines_agree(tmp_path):
    for kind in KINDS:
        architectures.save(kind, tmp_path / kind)
    (tmp_path / "ranks").mkdir()
    first, second = run_ranks(_all_cases, 2, Path(tmp_path / "ranks"), str(tmp_path))
    for kind in KINDS:
        plain, sharded = (first[f"{kind} {name}"] for name in CASES)
        assert second[f"{kind} zero3"]["losses"] == sharded["losses"] == pytest.approx(plain["losses"], abs=1e-4)
        assert plain["weights"].keys() == sharded["weights"].keys()
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(sharded["weights"][name], weight, atol=1e-4, rtol=1e-3, msg=name)
