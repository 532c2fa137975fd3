"""The ranker's engine in the service: what is checked before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import GenerationSettings, Settings
from notellm2_ray.infer import engine
from notellm2_ray.online.engines import yes_no_scorer
from tests.support.tiny_mllm import save_mllm


def test_a_ranker_whose_prompts_cannot_fit_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "engine_environment", lambda _: {})
    monkeypatch.setattr(engine, "start_engine", lambda *_, **limits: limits)
    model = save_mllm(tmp_path)
    settings = Settings(generation=GenerationSettings(max_model_len=128))
    with pytest.raises(ConfigError, match=r"generation\.max_model_len=128"):
        yes_no_scorer(model, settings)
    scorer = yes_no_scorer(model, Settings())
    pixels = Settings().ranker.max_image_pixels
    assert scorer.engine == {"images": 1, "pixels": pixels, "recurring": True, "offline": False}
