"""What a run records while it is under way: history.jsonl, curves for a logger, and its speed."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.run import write_atomically

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
HistoryRow = Mapping[str, Any]
T = TypeVar("T")


def require_logger(name: str) -> None:
    """Raise :class:`ConfigError` if the package that ``train.logger`` needs is not installed."""
    package = _PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"train.logger={name} needs the package {package}: pip install {package}")


class History:
    """history.jsonl: one row per step and one per validation, each with its ``step`` (the number of updates so far)."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for appending after ``step``; rows of later steps, which a stopped run left, are dropped."""
        self.rows = [row for row in read_history(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  closed by close()

    def add(self, row: HistoryRow) -> None:
        """Append a row."""
        self.rows.append(dict(row))
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a history, without a last line that a kill cut short."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise
    return rows


class Stopwatch:
    """The speed of training steps alone, and how long they waited for input; validations and checkpoints do not count.

    Args:
        per_step: what a step counts for, such as its notes, of all ranks together.
    """

    def __init__(self, per_step: int) -> None:
        self._per_step, self._steps, self._seconds = per_step, 0, 0.0
        self._began = self._waited = 0.0

    def waiting(self, steps: Iterable[T]) -> Iterator[T]:
        """The same, with the time that each took to come; that of the first does not count."""
        given, first = iter(steps), True
        while True:
            began = time.monotonic()
            try:
                step = next(given)
            except StopIteration:
                return
            self._waited += 0.0 if first else time.monotonic() - began
            first = False
            yield step

    def begin(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def end(self) -> float:
        """The step has ended; returns its speed, per second."""
        seconds = time.monotonic() - self._began
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        return self._per_step / max(seconds, 1e-9)

    @property
    def speed(self) -> float:
        """Mean speed of all steps so far, per second."""
        return self._per_step * self._steps / max(self._seconds, 1e-9)

    @property
    def waiting_share(self) -> float:
        """Share of waiting in the time of waiting and training."""
        return self._waited / max(self._waited + self._seconds, 1e-9)


def open_logger(
    name: str, directory: Path, settings: Mapping[str, Any], step: int
) -> tuple[Callable[[HistoryRow], None], Callable[[], None]]:
    """Functions that log a row to ``train.logger`` and that close it; a resumed run continues its curves."""
    return _LOGGERS[name](directory, settings, step)


def _no_logger(directory: Path, settings: Mapping[str, Any], step: int) -> Any:
    return lambda row: None, lambda: None


def _tensorboard(directory: Path, settings: Mapping[str, Any], step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def add(row: HistoryRow) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(f"train/{name}", value, row["step"])

    return add, writer.close


def _wandb(directory: Path, settings: Mapping[str, Any], step: int) -> Any:
    import wandb

    name = f"{directory.parent.parent.name}-{directory.name}"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "notellm2-ray"),
        name=name,
        id=_remembered(directory / "wandb_run", wandb.util.generate_id),
        resume="allow",
        dir=str(directory),
        config=dict(settings),
    )
    return lambda row: run.log(_numbers(row), step=row["step"]), run.finish


def _mlflow(directory: Path, settings: Mapping[str, Any], step: int) -> Any:
    import mlflow

    def create() -> str:
        return mlflow.MlflowClient().create_run("0", run_name=directory.name).info.run_id

    mlflow.start_run(run_id=_remembered(directory / "mlflow_run", create))
    if step == 0:
        mlflow.log_params(settings)
    return lambda row: mlflow.log_metrics(_numbers(row), step=row["step"]), mlflow.end_run


_LOGGERS = {"none": _no_logger, "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def _numbers(row: HistoryRow) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


def _remembered(path: Path, create: Callable[[], str]) -> str:
    if not path.exists():
        write_atomically(path, create())
    return path.read_text(encoding="utf-8")
