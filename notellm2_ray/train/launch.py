"""Training as a stage: a Ray Train run from pairs to a model directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import ConfigError, NoteLLMError
from notellm2_ray.core.settings import ModelSettings, RaySettings, TrainSettings
from notellm2_ray.train.checkpoints import RUN_NAME, RunFiles, publish
from notellm2_ray.train.history import require_logger
from notellm2_ray.train.sampler import Pairs, PairSampler

log = logging.getLogger("notellm2_ray")


def train_embedder(
    model: ModelSettings,
    train: TrainSettings,
    seed: int,
    *,
    pairs: Path,
    llm_path: str,
    vision_path: str,
    output: Path,
) -> dict[str, Any]:
    """Train an embedder on mined pairs with Ray Train; a run that was stopped in ``output`` goes on.

    Args:
        pairs: holds train.parquet and valid.parquet (PAIR_SCHEMA) and train_notes.arrow (a NoteStore), on storage that
            every worker sees.
        llm_path, vision_path: what ``model.llm`` and ``model.vision`` stand for.
        output: gets ``model/`` (the weights with the best validation figure; the last ones if there are no validation
            pairs) and ``history.jsonl``: {step, loss, lr, temperature, notes_per_s} after every step and
            {step, valid_loss, valid_recall} after every validation.

    Returns:
        steps, pairs, validation_pairs, best_step, best_recall, final_loss, notes_per_s (of all ranks together, training
        steps alone).

    Raises:
        ConfigError: the cluster is too small, or a package is missing.
        DataError: pairs or notes are missing or unusable.
        ModelError: a model cannot be read, or the loss is not finite.
        ray.train.TrainingFailedError: workers failed more often than ``train.max_failures``.
    """
    from notellm2_ray.core.cluster import connect

    files = RunFiles(Path(output).absolute())
    if files.result.exists():
        return publish(files, {})
    require_logger(train.logger)
    PairSampler(Pairs(Path(pairs) / "train.parquet"), train.batch_pairs, seed)  # fails at once if it must
    connect(RaySettings())
    job = {
        "model": model,
        "train": train,
        "seed": seed,
        "pairs": Path(pairs).absolute(),
        "llm_path": absolute(llm_path),
        "vision_path": absolute(vision_path),
        "output": files.output,
    }
    return publish(files, run_training(embedder_worker, job, train, files))


def run_training(
    rank: Callable[[dict[str, Any]], dict[str, Any]],
    job: dict[str, Any],
    train: TrainSettings,
    files: RunFiles,
    section: str = "train",
) -> dict[str, Any]:
    """Run ``rank`` on Ray Train's workers, going on from where an earlier run in ``files`` was stopped.

    Ray must be connected.

    Args:
        rank: gets {"job": job, "resume_from": a checkpoint or None}; calls :func:`run_worker`.
        section: of the settings, for messages.

    Returns:
        What ``rank`` returned on rank 0.

    Raises:
        ConfigError: the cluster is too small.
        NoteLLMError: an error of the user's making that a rank left.
        ray.train.TrainingFailedError: workers failed more often than ``train.max_failures``.
    """
    import ray
    import ray.train

    embedded = not os.environ.get("RAY_ADDRESS")
    _require_resources(ray, train, embedded, section)
    files.forget_error()
    config = {"job": job, "resume_from": files.repair_snapshot()}
    try:
        with _environment(embedded):
            result = _trainer(rank, config, train, files, embedded).fit()
    except ray.train.TrainingFailedError:
        if error := files.read_error():
            raise error from None
        raise
    if error := files.read_error():
        raise error
    return result.return_value or {}


def _trainer(rank: Any, config: dict[str, Any], train: TrainSettings, files: RunFiles, embedded: bool) -> Any:
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class EmbeddedTrainer(TorchTrainer):
        """Without the process that watches over the controller by asking the dashboard, which is not there."""

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    resources = {"CPU": train.cpus_per_worker}
    if train.gpus_per_worker:
        resources["GPU"] = train.gpus_per_worker
    return (EmbeddedTrainer if embedded else TorchTrainer)(
        rank,
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
    """On CPUs, threads that wait for each other soon give way.

    By default they spin for milliseconds, and where anything else runs on the same cores a step then takes many times
    as long (measured on two cores: 0.3 s alone either way; beside a busy process 0.65 s like this, several s without).
    """
    if train.gpus_per_worker or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        return {}
    return {"env_vars": {"GOMP_SPINCOUNT": "1000"}}


def embedder_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker does for an embedder."""
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun

    job = EmbedderJob(**config["job"])
    return run_worker(
        lambda device, report: EmbedderRun(job, device, report), RunFiles(job.output), job.train, config["resume_from"]
    )


def run_worker(
    make: Callable[[Any, Callable[[Path, dict[str, Any]], None]], Any],
    files: RunFiles,
    train: TrainSettings,
    resume_from: Path | None,
) -> dict[str, Any]:
    """In a Ray Train worker: train from Ray's latest checkpoint to the end; the figures on rank 0.

    Args:
        make: builds the :class:`~notellm2_ray.train.run_loop.TrainingRun` from its device and a function that reports.
        resume_from: where to go on from if Ray itself remembers no checkpoint.
    """
    import ray.train
    import ray.train.torch
    from ray.train.v2.api.report_config import CheckpointUploadMode

    from notellm2_ray.train.run_loop import prepare_process

    if files.read_error():
        return {}
    prepare_process(train.cpus_per_worker)

    def report(directory: Path, metrics: dict[str, Any]) -> None:
        # Already where Ray Train keeps its checkpoints: nothing is to be copied.
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


def _require_resources(ray: Any, train: TrainSettings, embedded: bool, section: str) -> None:
    """Refuse what the cluster will never have; a cluster that scales may still get it."""
    there = ray.cluster_resources()
    needed = {"CPU": train.cpus_per_worker * train.num_workers, "GPU": train.gpus_per_worker * train.num_workers}
    for kind, amount in needed.items():
        if amount > there.get(kind, 0):
            message = (
                f"training asks for {amount:g} {kind}s ({section}.num_workers={train.num_workers} times "
                f"{section}.{kind.lower()}s_per_worker), the cluster has {there.get(kind, 0):g}"
            )
            if embedded:
                raise ConfigError(f"{message}: lower them, or raise ray.num_cpus, or join a larger cluster")
            log.warning("%s: waiting for it to grow", message)


def absolute(path: str) -> str:
    """Workers run in directories of their own; a hub name stays as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


@contextmanager
def _environment(embedded: bool) -> Iterator[None]:
    """Environment variables that Ray Train takes over from the driver, unless the user has set them."""
    wanted = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # it looks after its workers every two seconds otherwise
    if embedded:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
