"""The training loop that every rank runs, for any model: steps, history, checkpoints, the best weights so far."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train import distributed
from notellm2_ray.train.batches import prefetched
from notellm2_ray.train.checkpoints import RunFiles, RunState, begin_checkpoint, read_state, write_state
from notellm2_ray.train.engine import Engine
from notellm2_ray.train.history import History, Stopwatch, open_logger
from notellm2_ray.train.readers import Readers
from notellm2_ray.train.schedule import learning_rate_factor

log = logging.getLogger("notellm2_ray")

_TIME_TO_WRITE = 10  # a checkpoint in the background has a tenth of the steps between two
_MUCH_WAITING = 0.1  # share of the training's time

Prepared = TypeVar("Prepared")
Report = Callable[[Path, dict[str, Any]], None]


class TrainingRun(ABC, Generic[Prepared]):
    """One rank of a training run.

    A subclass builds ``engine`` and defines a step. Order, learning rate and dropout depend only on the step's number,
    so that a resumed run does the same as an undisturbed one.

    Attributes:
        total: number of updates of the whole run.
        readers: make the features of what a step reads.
        stage: its name on the command line, for the log.
        unit, per_step: the unit of the speed, and how many of them a step has.
    """

    engine: Engine
    readers: Readers[Any, Any]
    total: int
    stage: str
    unit: str
    per_step: int

    def __init__(self, files: RunFiles, settings: TrainSettings, seed: int, device: torch.device, report: Report):
        """Begin at step 0.

        Args:
            report: called on every rank with a checkpoint's directory and figures, when it is complete.
        """
        self.files, self.settings, self.seed, self.device, self._report = files, settings, seed, device, report
        self.state = RunState()
        self._reported: list[RunState] = []
        self._unfinished: RunState | None = None  # of a checkpoint that is still being written

    @abstractmethod
    def prepare(self, step: int) -> Prepared:
        """Read what this rank needs for a step (counted from 0); may be called from a thread."""

    @abstractmethod
    def train(self, step: int, prepared: Prepared) -> dict[str, Any]:
        """Take a step; returns figures for the history, among them ``loss``: of the whole batch, before the update."""

    @abstractmethod
    def validate(self) -> dict[str, Any] | None:
        """Figures of a validation, or None if there is no validation data. May call :meth:`keep`."""

    @abstractmethod
    def write_weights(self, directory: Path) -> None:
        """Write the weights that the run keeps; every rank calls it, and rank 0 writes."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """Figures of the run besides those that every run has."""

    def resume(self, checkpoint: Path) -> None:
        """Continue after ``checkpoint``."""
        self.state = read_state(checkpoint)
        self.engine.load(checkpoint)
        self._reported = [self.state]
        if distributed.rank() == 0:
            log.info("%s: continuing after step %d", self.stage, self.state.step)

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the run's figures on rank 0."""
        try:
            return self._run()
        finally:
            self.readers.close()

    def _run(self) -> dict[str, Any]:
        first = distributed.rank() == 0
        history = History(self.files.history, self.state.step) if first else None
        name = self.settings.logger if first else "none"
        add_to_log, close_log = open_logger(name, self.files.output, to_plain(self.settings), self.state.step)
        progress = Progress(self.stage, "steps", self.total, before=self.state.step)
        stopwatch = Stopwatch(self.per_step)
        peak = self.settings.learning_rate
        assert peak is not None
        self.engine.module.train()
        steps = prefetched(self._numbered, range(self.state.step, self.total), self.settings.prefetch_batches)
        for step, prepared in stopwatch.waiting(steps):
            stopwatch.begin()
            # Seeded by the step, so that a resumed run has the same dropout as an undisturbed one.
            torch.manual_seed(stream_seed(self.seed, "train", "dropout", step, distributed.rank()))
            figures = self.train(step, prepared)
            self.state = self.state.model_copy(update={"step": step + 1})
            speed = stopwatch.end()
            if first:
                progress.add(text=f"loss {figures['loss']:.4f}, {stopwatch.speed:.3g} {self.unit}/s")
            row = {"step": step + 1, "loss": figures["loss"], "lr": self.factor(step) * peak}
            row |= {**figures, f"{self.unit}_per_s": round(speed, 1)}
            rows = [row, *self._validation_rows()]
            if history is not None:
                for row in rows:
                    history.add(row)
                    add_to_log(row)
            self._checkpoint_if_due()
        self._finish_checkpoint()
        close_log()
        if history is not None:
            history.close()
        if self.state.best_step is None:
            self.keep()  # without validation the last weights are kept
        return self._all_figures(history, stopwatch)

    def factor(self, step: int) -> float:
        """The factor on the peak learning rates in ``step``."""
        return learning_rate_factor(step, self.total, self.settings.warmup_ratio)

    def keep(self, **best: float) -> None:
        """Keep the current weights as the best so far; ``best`` holds fields of the state."""
        self.write_weights(self.files.best(self.state.step))
        self.state = self.state.model_copy(update={"best_step": self.state.step, **best})
        distributed.barrier()

    def _numbered(self, step: int) -> tuple[int, Prepared]:
        return step, self.prepare(step)

    def _validation_rows(self) -> list[dict[str, Any]]:
        step = self.state.step
        if step % self.settings.validate_every_steps and step < self.total:
            return []
        figures = self.validate()
        return [] if figures is None else [{"step": step, **figures}]

    def _checkpoint_if_due(self) -> None:
        step, every = self.state.step, self.settings.checkpoint_every_steps
        # All ranks must finish it in the same step. What is written in the background is usually there by then.
        if self._unfinished and step >= self._unfinished.step + max(1, every // _TIME_TO_WRITE):
            self._finish_checkpoint()
        if step % every or step == self.total:
            return
        self._finish_checkpoint()
        directory = self.files.checkpoint(step)
        if distributed.rank() == 0:
            begin_checkpoint(directory)
        distributed.barrier()
        self.engine.save(directory)
        self._unfinished = self.state
        if not self.settings.background_checkpoints:
            self._finish_checkpoint()

    def _finish_checkpoint(self) -> None:
        """Complete the checkpoint that is being written, if there is one."""
        state, self._unfinished = self._unfinished, None
        if state is None:
            return
        self.engine.finish_save()
        directory = self.files.checkpoint(state.step)
        distributed.barrier()
        if distributed.rank() == 0:
            write_state(directory, state)
        self._report(directory, {"step": state.step})
        # Ray records a checkpoint some time after the report. A run that is killed before that resumes from an earlier
        # one, whose best weights must still be there.
        self._reported = [*self._reported[-2:], state]
        if distributed.rank() == 0:
            self.files.keep_best(one.best_step for one in (*self._reported, self.state))

    def _all_figures(self, history: History | None, stopwatch: Stopwatch) -> dict[str, Any]:
        if history is None:
            return {}
        waited = stopwatch.waiting_share
        if waited > _MUCH_WAITING:
            words = "%s: %.0f%% of the time went into waiting for input: set readers higher, or give it more CPUs"
            log.warning(words, self.stage, 100 * waited)
        losses = [row["loss"] for row in history.rows if "loss" in row]
        return {
            "steps": self.total,
            **self.figures(),
            "best_step": self.state.best_step,
            "final_loss": losses[-1],
            f"{self.unit}_per_s": round(stopwatch.speed, 1),
            "waiting_share": round(waited, 3),
        }


def resolved_precision(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """The settings with ``precision=auto`` replaced by what suits the device; with ``tf32`` the process may use it."""
    from notellm2_ray.models.device import allow_tf32, multiplies_bf16

    allow_tf32(settings.precision, device)
    if settings.precision != "auto":
        return settings
    return settings.model_copy(update={"precision": "bf16" if multiplies_bf16(device) else "fp32"})


def prepare_process(cpus: float) -> None:
    """Set up a worker process: threads, the compilers' search path, and log levels."""
    threads = max(1, int(cpus))
    torch.set_num_threads(threads)
    # DeepSpeed's optimizer on the CPU has an OpenMP of its own, which reads this when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    keep_freed_memory()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for ninja
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO for every library
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
