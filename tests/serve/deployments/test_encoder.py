"""The encoder on a card that engines share with it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from notellm2_ray.core.settings.serve import DeploymentSettings, EncodeSettings
from notellm2_ray.serve.deployments import encoder as module


@pytest.mark.parametrize(("gpus", "limit", "starts"), [(0.2, [0.18], 1), (1, [], 1), (None, [], 0)])
def test_it_keeps_to_its_share_and_starts_alone(monkeypatch, gpus, limit, starts):
    limits, ledger = [], []

    @contextmanager
    def only_start():
        ledger.append("begin")
        yield
        ledger.append("end")

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: limits.append(share))
    monkeypatch.setattr(module, "only_start", only_start)
    monkeypatch.setattr(module, "_replica", lambda: "r")
    monkeypatch.setattr(module, "LoadedModel", lambda path, device, *_: ledger.append(device))
    monkeypatch.setattr(module, "_fingerprint", lambda spec, path: None)
    monkeypatch.setattr(module.Encoder, "_served", lambda _: Path("m"))
    monkeypatch.setattr(module.Encoder, "_keep_looking", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    serve = SimpleNamespace(encoder=DeploymentSettings(gpus=gpus), encode=EncodeSettings())
    module.Encoder(SimpleNamespace(serve=serve, precision="fp32", dimensions=None))
    assert limits == pytest.approx(limit)
    assert ledger == (["begin", "cuda", "end"] if starts else ["cpu"])
