"""Schedule, order of the pairs, prefetching, history and the files of a run, without a model."""

from __future__ import annotations

import json
import sys
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.train.checkpoints import RunFiles, RunState, publish, read_state, write_state
from notellm2_ray.train.history import History, open_logger, read_history, require_logger
from notellm2_ray.train.schedule import learning_rate_factor, num_steps


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": "plain", "offload": "optimizer"}, "train.offload is DeepSpeed's.* set train.offload=none"),
        ({"zero_stage": 2, "offload": "parameters_and_optimizer"}, "needs train.zero_stage=3"),
        ({"zero_stage": 0, "offload": "optimizer"}, "needs train.zero_stage 1, 2 or 3"),
        ({"batch_pairs": 9, "num_workers": 2}, "must be a multiple of train.num_workers"),
    ],
)
def test_contradicting_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        build(TrainSettings, values)


def test_learning_rate_warms_up_and_decays_to_zero():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[12] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(1 / 16)
    assert learning_rate_factor(20, 20, 0.2) == 0.0
    assert learning_rate_factor(0, 1, 0.0) == 1.0


def test_a_run_ends_with_its_epochs_or_its_steps():
    assert num_steps(TrainSettings(epochs=3), 7) == 21
    assert num_steps(TrainSettings(epochs=3, max_steps=10), 7) == 10


class FakePairs:
    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs

    def __len__(self) -> int:
        return self.num_pairs


@given(num_pairs=st.integers(8, 200), world_size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 5))
def test_an_epoch_deals_every_pair_once_and_the_ranks_share_a_step(num_pairs, world_size, seed):
    from notellm2_ray.train.sampler import PairSampler

    whole = PairSampler(FakePairs(num_pairs), 8, seed)
    ranks = [PairSampler(FakePairs(num_pairs), 8, seed, rank, world_size) for rank in range(world_size)]
    steps = whole.steps_per_epoch
    for step in range(2 * steps):
        assert np.array_equal(whole.rows(step), np.concatenate([rank.rows(step) for rank in ranks]))
    dealt = np.concatenate([whole.rows(step) for step in range(steps)])
    assert len(set(dealt)) == len(dealt) == num_pairs // 8 * 8


def test_order_follows_from_seed_and_epoch():
    from notellm2_ray.train.sampler import PairSampler

    first, again, other = (PairSampler(FakePairs(100), 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows(3), again.rows(3))
    assert not np.array_equal(first.rows(3), other.rows(3))
    assert not np.array_equal(first.rows(0), first.rows(2))


def test_too_few_pairs_for_a_batch_say_so():
    from notellm2_ray.train.sampler import PairSampler

    with pytest.raises(DataError, match=r"7 training pairs do not fill one batch of train.batch_pairs=8"):
        PairSampler(FakePairs(7), 8, 0)


def test_validation_masks_duplicates_as_training_does():
    import torch

    from notellm2_ray.models.embedder.losses import embedder_loss
    from notellm2_ray.models.embedder.mlrm import NoteVectors
    from notellm2_ray.train.validation import Validation

    class Repeated(FakePairs):  # the first note stands in every pair
        keys = np.array([[0, 1], [0, 2], [0, 3]])
        note_ids = ("a", "b", "c", "d")

    vectors = NoteVectors(torch.randn(4, 8), torch.randn(4, 8), torch.ones(4, dtype=torch.bool), torch.tensor(1.0))
    losses = []
    for masked in (True, False):
        validation = Validation(
            Repeated(3), None, max_pairs=9, batch_pairs=3, mask_duplicates=masked, seed=0, prefetch=0
        )
        keys = torch.from_numpy(validation.keys.T.reshape(-1).copy())
        rows = NoteVectors(*(column[keys] for column in vectors[:3]), vectors.temperature)
        expected = embedder_loss(rows, keys, alpha=9.0, mask_duplicates=masked).total
        losses.append(validation._score(vectors, 9.0).loss)
        assert losses[-1] == pytest.approx(float(expected))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_keeps_the_order_and_runs_no_further_ahead_than_asked(depth):
    from notellm2_ray.train.batches import prefetched

    begun: list[int] = []
    lock = threading.Lock()

    def prepare(key: int) -> int:
        with lock:
            begun.append(key)
        time.sleep(0.001 * (key % 3))
        return key * key

    seen = []
    for value in prefetched(prepare, range(12), depth):
        seen.append(value)
        assert len(begun) <= len(seen) + depth
    assert seen == [key * key for key in range(12)]


def test_an_error_while_preparing_arrives_in_its_place():
    from notellm2_ray.train.batches import prefetched

    def prepare(key: int) -> int:
        if key == 2:
            raise DataError("note n2 has a broken image")
        return key

    values = prefetched(prepare, range(5), 2)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(DataError, match="note n2"):
        next(values)


def test_history_drops_what_is_done_again_and_half_a_line(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path, 0)
    for step in range(1, 6):
        history.add({"step": step, "loss": float(step)})
    history.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    resumed = History(path, 3)
    resumed.add({"step": 4, "loss": 44.0})
    resumed.close()
    assert [(row["step"], row["loss"]) for row in read_history(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 44.0)]


def test_a_missing_logger_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="train.logger=wandb needs the package wandb"):
        require_logger("wandb")
    require_logger("none")


class FakeWandb(types.ModuleType):
    """Remembers what it is told; ids are numbered."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.util = types.SimpleNamespace(generate_id=lambda: f"run{len(self.started)}")

    def init(self, **options: object) -> types.SimpleNamespace:
        self.started.append(options)
        return types.SimpleNamespace(log=lambda row, step: self.logged.append((step, row)), finish=lambda: None)


class FakeMlflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs, self.started, self.logged = 0, [], []

    def MlflowClient(self) -> types.SimpleNamespace:  # noqa: N802  mlflow's own name
        def create_run(experiment: str, run_name: str) -> types.SimpleNamespace:
            self.runs += 1
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run{self.runs}"))

        return types.SimpleNamespace(create_run=create_run)

    def start_run(self, run_id: str) -> None:
        self.started.append(run_id)

    def log_params(self, settings: dict) -> None:
        self.settings = settings

    def log_metrics(self, row: dict, step: int) -> None:
        self.logged.append((step, row))

    def end_run(self) -> None:
        pass


@pytest.mark.parametrize("fake", [FakeWandb(), FakeMlflow()], ids=lambda fake: fake.__name__)
def test_a_resumed_run_goes_on_with_its_curves(fake, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for step in (0, 5):
        add, close = open_logger(fake.__name__, tmp_path, {"learning_rate": 0.1}, step)
        add({"step": step + 1, "loss": 2.0, "valid_recall": None})
        close()
    runs = [run["id"] if isinstance(run, dict) else run for run in fake.started]
    assert len(runs) == 2 and runs[0] == runs[1]
    assert fake.logged == [(1, {"loss": 2.0}), (6, {"loss": 2.0})]


def test_an_error_of_a_rank_reaches_the_driver_as_it_was(tmp_path):
    files = RunFiles(tmp_path)
    assert files.read_error() is None
    files.write_error(ModelError("step 3: the loss is nan"))
    error = files.read_error()
    assert type(error) is ModelError and str(error) == "step 3: the loss is nan"
    files.forget_error()
    assert files.read_error() is None


def _checkpoint(files: RunFiles, step: int) -> None:
    files.checkpoint(step).mkdir(parents=True)
    write_state(files.checkpoint(step), RunState(step=step))


def _snapshot(files: RunFiles, text: str) -> None:
    (files.root / "run" / "checkpoint_manager_snapshot.json").write_text(text)


def test_a_damaged_snapshot_costs_no_checkpoint(tmp_path):
    files = RunFiles(tmp_path)
    _checkpoint(files, 10)
    _checkpoint(files, 20)
    files.checkpoint(30).mkdir()  # killed while it was written
    _snapshot(files, '{"checkpoint_results": [{"che')
    resume_from = files.repair_snapshot()
    assert resume_from == files.checkpoint(20)
    assert read_state(resume_from).step == 20
    assert not list((files.root / "run").glob("*.json"))


def test_checkpoints_that_ray_does_not_know_are_removed(tmp_path):
    files = RunFiles(tmp_path)
    _checkpoint(files, 10)
    _checkpoint(files, 20)
    _snapshot(files, json.dumps({"checkpoint_results": [{"checkpoint_dir_name": files.checkpoint(10).name}]}))
    assert files.repair_snapshot() is None
    assert files.checkpoint(10).exists() and not files.checkpoint(20).exists()


@pytest.mark.parametrize("killed_after", ["nothing", "result", "model"])
def test_publishing_can_be_repeated(tmp_path, killed_after):
    files = RunFiles(tmp_path)
    files.best(7).mkdir(parents=True)
    (files.best(7) / "config.json").write_text("{}")
    result = {"steps": 9, "best_step": 7}
    if killed_after != "nothing":
        files.result.write_text(json.dumps(result))
    if killed_after == "model":
        files.best(7).rename(files.model)
    assert publish(files, result if killed_after == "nothing" else {}) == result
    assert (files.model / "config.json").exists() and not files.root.exists()
    assert publish(files, {}) == result
