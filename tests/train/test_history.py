"""A run's history, its speed, and the loggers that it can be sent to."""

from __future__ import annotations

import sys
import types

import pytest

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.train import history as module
from notellm2_ray.train.history import History, Stopwatch, open_logger, read_history, require_logger


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


def test_the_speed_is_that_of_steps_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stopwatch = Stopwatch(64)
    speeds = []
    for seconds, pause in ((2.0, 30.0), (6.0, 0.0)):  # a validation between the steps
        stopwatch.begin()
        now[0] += seconds
        speeds.append(stopwatch.end())
        now[0] += pause
    assert speeds == [32.0, pytest.approx(64 / 6)] and stopwatch.speed == 16.0


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
