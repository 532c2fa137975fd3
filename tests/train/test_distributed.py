"""What ranks pass to each other: on GPUs it lies where NCCL reads it, and gradients travel once a step."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import notellm2_ray
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train import distributed, plain
from notellm2_ray.train.plain import PlainEngine
from notellm2_ray.train.zero import ZeroEngine
from tests.support import embedder_training, ranker_training
from tests.support.gpu_ranks import GPU, OnGpu, first_of_two_gpus

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
PACKAGE = Path(notellm2_ray.__file__).parent
COLLECTIVES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list"),
    *(
        "barrier",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_to_all",
        "all_to_all_single",
        "gather_object",
    ),
}


def test_numbers_and_rows_of_any_device_reach_the_group():
    with first_of_two_gpus() as calls:
        assert distributed.mean_over_ranks(torch.tensor(3)) == 3
        rows = torch.tensor([[1.0], [2.0]], requires_grad=True)
        gathered, first = distributed.gather_rows(rows)
        gathered.sum().backward()
        assert gathered.tolist() == [[1], [2], [1], [2]] and first == 0 and not isinstance(gathered, OnGpu)
        on_gpu, _ = distributed.gather_rows(torch.tensor([True]).to(GPU))
        assert on_gpu.device == GPU
    assert rows.grad.tolist() == [[2], [2]]
    assert calls == ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_into_tensor"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return embedder_training.write(tmp_path_factory.mktemp("embedder"))


@pytest.mark.parametrize("passes", [None, 5])
def test_an_embedder_trains_and_validates_as_one_of_two_gpus(directory, tmp_path, passes):
    from notellm2_ray.train.checkpoints import RunFiles
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun

    train = embedder_training.train_settings(
        num_workers=2, gpus_per_worker=1, max_steps=2, cached_notes_per_pass=passes, readers=0
    )
    paths = {"llm_path": str(directory / "llm"), "vision_path": str(directory / "clip"), "pairs": directory / "pairs"}
    job = EmbedderJob(model=embedder_training.model_settings(), train=train, seed=1, output=tmp_path, **paths)
    with first_of_two_gpus() as calls:
        counts = EmbedderRun(job, GPU, lambda directory, metrics: None).run()
    assert counts["steps"] == 2 and (RunFiles(tmp_path).best(counts["best_step"]) / "model.safetensors").exists()
    assert set(calls) == {"broadcast", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"}


def test_a_ranker_tunes_and_validates_as_one_of_two_gpus(tmp_path):
    from notellm2_ray.train.ranker_data import RankerFiles, gather_notes
    from notellm2_ray.train.ranker_run import RankerJob, RankerRun

    material = ranker_training.write(tmp_path / "material")
    ranker, tune = ranker_training.ranker_settings(), ranker_training.tune_settings(
        num_workers=2, gpus_per_worker=1, max_batch_tokens=140, max_steps=2, readers=0
    )  # fmt: skip
    files = RankerFiles(material / "sequences", material / "preferences.parquet", tmp_path / "notes.arrow")
    gather_notes(files, material / "notes", ranker)
    with first_of_two_gpus() as calls:
        job = RankerJob(ranker, tune, str(material / "mllm"), files, tmp_path)
        assert RankerRun(job, GPU, lambda directory, metrics: None).run()["steps"] == 2
    assert set(calls) == {"broadcast", "all_reduce", "all_gather_into_tensor"}


class _Parameter(NamedTuple):
    """What ZeRO-3 leaves of a parameter; with offload its shard is in CPU memory."""

    ds_tensor: torch.Tensor
    ds_numel: int
    ds_shape: tuple[int, ...]


def test_a_shard_in_cpu_memory_is_gathered_over_gpus():
    engine = object.__new__(ZeroEngine)
    engine._device = GPU
    with first_of_two_gpus():
        whole = engine._gather(_Parameter(torch.tensor([1.0, 2.0]), 3, (3, 1)))
    assert whole.tolist() == [[1], [2], [1]] and not isinstance(whole, OnGpu)


def test_collectives_are_called_in_one_place():
    def calls(path: Path) -> list[str]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        called = [one.func for one in nodes if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)]
        return [f"{path.name}: dist.{one.attr}" for one in called
                if one.attr in COLLECTIVES and isinstance(one.value, ast.Name) and one.value.id == "dist"]  # fmt: skip

    files = [*PACKAGE.rglob("*.py")]
    found = {path.relative_to(PACKAGE).as_posix() for path in files if calls(path)}
    assert found == {"train/distributed.py"}, "it alone moves tensors to where the group reads them"


class _Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 1)
        self.model.is_fresh = lambda name: False

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model(rows).sum()


def test_gradients_of_a_step_in_parts_travel_once(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "world_size", lambda: 2)  # so that the model is wrapped though there is one process
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        settings = TrainSettings(engine="plain", learning_rate=1e-3, max_grad_norm=1e9)
        engine = PlainEngine(_Step(), settings, torch.device("cpu"))
        sent: list[Any] = []

        def hook(state, bucket):  # PyTorch refuses annotations that are text
            sent.append(bucket.buffer().clone())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        engine._forward.register_comm_hook(None, hook)
        rows = torch.arange(12.0).reshape(4, 3)
        for _ in range(2):
            for part in rows[:3]:
                engine.accumulate(engine(part[None], last=False))
            engine.update(engine(rows[3:], last=True), 1.0)
        assert len(sent) == 2
        for gradients in sent:
            assert sorted(gradients.tolist()) == sorted([4.0, *rows.sum(dim=0).tolist()])
    finally:
        dist.destroy_process_group()
