"""The files of a training run: resumable states, the best weights so far, and an error.

ray_train/run/step-00000500/   the engine's state and progress.json: a checkpoint of Ray Train
ray_train/best/500/            the best weights so far: a complete model, or an adapter
ray_train/error.json           an error that a retry would only repeat
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from notellm2_ray.core import errors
from notellm2_ray.core.errors import NoteLLMError
from notellm2_ray.core.run import write_atomically

RUN_NAME = "run"
_PROGRESS = "progress.json"
_SNAPSHOT = "checkpoint_manager_snapshot.json"


class RunState(BaseModel):
    """The state of a run beside the engine's. Order, learning rate and dropout depend on the step alone."""

    step: int = 0  # updates so far
    best_step: int | None = None
    best_score: float | None = None  # recall for an embedder, AUC for a ranker
    best_loss: float | None = None


class RunFiles:
    """Paths under an output directory.

    Args:
        kept: name of the directory in which the best weights end up.
    """

    def __init__(self, output: Path, kept: str = "model") -> None:
        self.output = output
        self.root = output / "ray_train"
        self.history = output / "history.jsonl"
        self.model = output / kept
        self.result = output / "training.json"
        self._error = self.root / "error.json"

    def checkpoint(self, step: int) -> Path:
        """Directory of the state after ``step`` updates."""
        return self.root / RUN_NAME / f"step-{step:08d}"

    def best(self, step: int) -> Path:
        """Directory of the weights after ``step`` updates, if they were the best so far."""
        return self.root / "best" / str(step)

    def keep_best(self, steps: Iterable[int | None]) -> None:
        """Remove the best weights of all steps but ``steps``."""
        kept = {str(step) for step in steps}
        for directory in (self.root / "best").glob("*"):
            if directory.name not in kept:
                shutil.rmtree(directory)

    def write_error(self, error: NoteLLMError) -> None:
        """Leave an error for the driver that a retry would only repeat."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(self._error, json.dumps({"kind": type(error).__name__, "message": str(error)}))

    def read_error(self) -> NoteLLMError | None:
        """The error that a rank left; None if there is none."""
        try:
            left = json.loads(self._error.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return getattr(errors, left["kind"])(left["message"])

    def forget_error(self) -> None:
        """Remove the error, before a new attempt."""
        self._error.unlink(missing_ok=True)

    def repair_snapshot(self) -> Path | None:
        """Repair Ray Train's list of its checkpoints before Ray reads it.

        Ray writes this list in place. A driver that is killed meanwhile leaves half of it, from which Ray refuses to
        start; such a list is removed. Checkpoints that are not in the list are removed too.

        Returns:
            None if Ray has a list. Otherwise the newest complete checkpoint (one with progress.json, which is written
            last), if there is one.
        """
        snapshot = self.root / RUN_NAME / _SNAPSHOT
        finished = sorted(path.parent for path in (self.root / RUN_NAME).glob(f"step-*/{_PROGRESS}"))
        try:
            known = json.loads(snapshot.read_text(encoding="utf-8"))["checkpoint_results"]
        except FileNotFoundError:
            return finished[-1] if finished else None
        except (ValueError, KeyError):
            snapshot.unlink()
            return finished[-1] if finished else None
        listed = {result["checkpoint_dir_name"] for result in known}
        for directory in (self.root / RUN_NAME).glob("step-*"):
            if directory.name not in listed:
                shutil.rmtree(directory)
        return None


def begin_checkpoint(directory: Path) -> None:
    """Mark a checkpoint of an earlier attempt as incomplete, before any rank writes into ``directory``."""
    (directory / _PROGRESS).unlink(missing_ok=True)


def write_state(directory: Path, state: RunState) -> None:
    """Complete a checkpoint after every rank has written its part."""
    write_atomically(directory / _PROGRESS, state.model_dump_json())


def read_state(directory: Path) -> RunState:
    """The state that :func:`write_state` wrote."""
    return RunState.model_validate_json((directory / _PROGRESS).read_text(encoding="utf-8"))


def publish(files: RunFiles, result: dict[str, Any]) -> dict[str, Any]:
    """Turn a finished run into its output: move the best weights to ``files.model`` and remove the run's own files.

    It can be called again after a kill at any point, with the same outcome.
    """
    if not files.result.exists():
        write_atomically(files.result, json.dumps(result))
    result = json.loads(files.result.read_text(encoding="utf-8"))
    best = files.best(result["best_step"])
    if best.exists():
        shutil.rmtree(files.model, ignore_errors=True)
        best.rename(files.model)
    shutil.rmtree(files.root, ignore_errors=True)
    return result
