"""Running a training on Ray Train's workers, from its start or from where an earlier run was stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import NoteLLMError
from notellm2_ray.core.room import require_room
from notellm2_ray.core.settings import TrainSettings
from notellm2_ray.train.checkpoints import RUN_NAME, RunFiles

log = logging.getLogger("notellm2_ray")


def run_training(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    job: dict[str, Any],
    train: TrainSettings,
    files: RunFiles,
    section: str = "train",
    wait_minutes: float = 0,
) -> dict[str, Any]:
    """Run ``worker`` on Ray Train's workers; continues an earlier run of ``files`` that was stopped.

    Ray must be connected.

    Args:
        worker: gets {"job": job, "resume_from": a checkpoint or None} and calls :func:`run_worker`.
        section: of the settings, for messages.
        wait_minutes: how long a cluster that was joined has to grow, if it has no room for all workers.

    Returns:
        What ``worker`` returned on rank 0.

    Raises:
        ConfigError: the cluster has no room for all workers.
        NoteLLMError: an error in a worker that a retry would only repeat.
        ray.train.TrainingFailedError: workers failed more often than ``train.max_failures``.
    """
    import ray.train

    embedded = not os.environ.get("RAY_ADDRESS")
    _require_resources(train, embedded, section, wait_minutes)
    files.forget_error()
    config = {"job": job, "resume_from": files.repair_snapshot()}
    try:
        with _environment(embedded):
            result = _trainer(worker, config, train, files, embedded).fit()
    except ray.train.TrainingFailedError:
        if error := files.read_error():
            raise error from None
        raise
    if error := files.read_error():
        raise error
    return result.return_value or {}


def _trainer(worker: Any, config: dict[str, Any], train: TrainSettings, files: RunFiles, embedded: bool) -> Any:
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class EmbeddedTrainer(TorchTrainer):
        """Without the process that watches the controller through the dashboard, which an embedded Ray lacks."""

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    resources = {"CPU": train.cpus_per_worker}
    if train.gpus_per_worker:
        resources["GPU"] = train.gpus_per_worker
    return (EmbeddedTrainer if embedded else TorchTrainer)(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=str(files.root),
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env=_worker_environment(train),
        ),
    )


def _worker_environment(train: TrainSettings) -> dict[str, Any]:
    """On CPUs, make waiting threads yield their core early.

    By default OpenMP's threads spin for milliseconds when they wait for each other. If another process needs the cores,
    a step then takes many times as long. Measured on two cores: alone 0.3 s either way; beside a busy process 0.65 s
    with this setting and several seconds without it.
    """
    if train.gpus_per_worker or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        return {}
    return {"env_vars": {"GOMP_SPINCOUNT": "1000"}}


def run_worker(
    make: Callable[[Any, Callable[[Path, dict[str, Any]], None]], Any],
    files: RunFiles,
    train: TrainSettings,
    resume_from: Path | None,
) -> dict[str, Any]:
    """In a Ray Train worker: train from Ray's latest checkpoint to the end; returns the figures on rank 0.

    Args:
        make: builds the :class:`~notellm2_ray.train.run_loop.TrainingRun` from its device and a function that reports
            checkpoints.
        resume_from: the checkpoint to continue from if Ray itself remembers none.
    """
    import ray.train
    import ray.train.torch
    from ray.train.v2.api.report_config import CheckpointUploadMode

    from notellm2_ray.train.run_loop import prepare_process

    if files.read_error():
        return {}
    prepare_process(train.cpus_per_worker)

    def report(directory: Path, metrics: dict[str, Any]) -> None:
        # The checkpoint is already where Ray Train keeps them, so nothing is uploaded.
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint(str(directory)),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    try:
        trainer = make(ray.train.torch.get_device(), report)
        latest = ray.train.get_checkpoint()
        resume_from = Path(latest.path) if latest else resume_from
        if resume_from:
            trainer.resume(resume_from)
        return trainer.run()
    except NoteLLMError as error:
        files.write_error(error)
        raise


def _require_resources(train: TrainSettings, embedded: bool, section: str, wait_minutes: float) -> None:
    needed = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    count = train.num_workers
    total = " and ".join(f"{count * each:g} {kind}s" for kind, each in needed.items() if each)
    require_room(
        needed,
        count,
        f"training needs {total}: {section}.num_workers={count}, each with "
        f"{section}.cpus_per_worker={train.cpus_per_worker:g} and {section}.gpus_per_worker={train.gpus_per_worker:g}",
        "Lower these settings, " + ("raise ray.num_cpus, or join a larger cluster" if embedded else "or add nodes"),
        embedded=embedded,
        wait_minutes=wait_minutes,
    )


def absolute(path: str) -> str:
    """A path made absolute, as workers run in other directories; a hub name stays as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


@contextmanager
def _environment(embedded: bool) -> Iterator[None]:
    """Set variables that Ray Train reads in the driver, except those that the user has set."""
    wanted = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # the default is 2 s
    if embedded:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # this machine is not preempted
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
