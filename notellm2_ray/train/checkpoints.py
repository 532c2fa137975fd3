"""A run's own files while it is under way: resumable states, the best weights so far, and what went wrong.

ray_train/run/step-00000500/   one rank's or all ranks' engine state, and progress.json   (Ray Train's checkpoint)
ray_train/best/500/            what the run keeps: a complete model, or an adapter
ray_train/error.json           an error of the user's making, which a retry would only repeat
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
    """Where a run stands. Order, learning rate and dropout follow from the step alone."""

    step: int = 0  # updates so far
    best_step: int | None = None
    best_score: float | None = None  # recall of an embedder, AUC of a ranker
    best_loss: float | None = None


class RunFiles:
    """Paths under an output directory; ``model`` is where the best weights end, by the name of ``kept``."""

    def __init__(self, output: Path, kept: str = "model") -> None:
        self.output = output
        self.root = output / "ray_train"
        self.history = output / "history.jsonl"
        self.model = output / kept
        self.result = output / "training.json"
        self._error = self.root / "error.json"

    def checkpoint(self, step: int) -> Path:
        """Where the state after ``step`` updates goes."""
        return self.root / RUN_NAME / f"step-{step:08d}"

    def best(self, step: int) -> Path:
        """Where the weights go that were the best after ``step`` updates."""
        return self.root / "best" / str(step)

    def keep_best(self, steps: Iterable[int | None]) -> None:
        """Remove the best weights of all other steps."""
        kept = {str(step) for step in steps}
        for directory in (self.root / "best").glob("*"):
            if directory.name not in kept:
                shutil.rmtree(directory)

    def write_error(self, error: NoteLLMError) -> None:
        """Leave an error for the driver: a retry would end in the same."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(self._error, json.dumps({"kind": type(error).__name__, "message": str(error)}))

    def read_error(self) -> NoteLLMError | None:
        """The error that a rank left."""
        try:
            left = json.loads(self._error.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return getattr(errors, left["kind"])(left["message"])

    def forget_error(self) -> None:
        """A new attempt begins."""
        self._error.unlink(missing_ok=True)

    def repair_snapshot(self) -> Path | None:
        """Look after what Ray Train remembers of its checkpoints before it reads it.

        Ray writes that file in place: a driver killed in the middle of it leaves a part, which Ray refuses to start
        from. The part is removed then.

        Returns:
            Where Ray remembers nothing, the newest checkpoint whose progress.json, written last, is there; else None.
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
    """Before any rank writes into ``directory``: what an earlier attempt left there is complete no more."""
    (directory / _PROGRESS).unlink(missing_ok=True)


def write_state(directory: Path, state: RunState) -> None:
    """Finish a checkpoint, of which every rank has written its part."""
    write_atomically(directory / _PROGRESS, state.model_dump_json())


def read_state(directory: Path) -> RunState:
    """What :func:`write_state` wrote."""
    return RunState.model_validate_json((directory / _PROGRESS).read_text(encoding="utf-8"))


def publish(files: RunFiles, result: dict[str, Any]) -> dict[str, Any]:
    """Turn a finished run into its output: the best weights as ``model``, and none of the run's own files.

    Done again after a kill at any point, it ends in the same.
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
