"""Training an embedder as a stage: a Ray Train run from pairs to a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from notellm2_ray.core.settings import ModelSettings, RaySettings, TrainSettings
from notellm2_ray.models.embedder.kinds import adapted_module
from notellm2_ray.train.checkpoints import RunFiles, publish
from notellm2_ray.train.history import require_logger
from notellm2_ray.train.launch import absolute, run_training, run_worker
from notellm2_ray.train.objectives import OBJECTIVES
from notellm2_ray.train.pairs import Pairs
from notellm2_ray.train.sampler import PairSampler


def train_embedder(
    model: ModelSettings,
    train: TrainSettings,
    seed: int,
    *,
    pairs: Path,
    llm_path: str,
    vision_path: str,
    output: Path,
    negatives: Path | None = None,
    wait_minutes: float = 0,
) -> dict[str, Any]:
    """Train an embedder on mined pairs with Ray Train; continues a run that was stopped in ``output``.

    Args:
        pairs: directory with train.parquet and valid.parquet (PAIR_SCHEMA) and train_notes.arrow (a NoteStore), on
            storage that every worker sees.
        negatives: file that mine-negatives wrote for train.parquet, for ``train.hard_negatives``; None: the column
            ``negatives`` of train.parquet, with ids of notes in train_notes.arrow.
        wait_minutes: how long a cluster that was joined has to grow, if it has no room for all workers.
        llm_path, vision_path: the models that ``model.llm`` and ``model.vision`` name.
        output: gets ``model/`` (the weights with the best validation score, or the last ones if there are no validation
            pairs) and ``history.jsonl``: {step, loss, lr, temperature, notes_per_s} after every step and
            {step, valid_loss, valid_recall} after every validation.

    Returns:
        steps, pairs, validation_pairs, best_step, best_recall, learning_rate, trained_parameters, final_loss,
        notes_per_s (of all ranks together, in training steps only).

    Raises:
        ConfigError: the cluster is too small, a package is missing, or the embedder has no LLM for ``train.lora``.
        DataError: pairs or notes are missing or unusable.
        ModelError: a model cannot be read, or the loss is not finite.
        ray.train.TrainingFailedError: workers failed more often than ``train.max_failures``.
    """
    from notellm2_ray.core.cluster import connect

    files = RunFiles(Path(output).absolute())
    if files.result.exists():
        return publish(files, {})
    require_logger(train.logger)
    OBJECTIVES.get(train.objective)  # fails at once if it must
    if train.lora is not None:
        adapted_module(model)
    found = Pairs(Path(pairs) / "train.parquet", negatives)
    PairSampler(found, train.batch_pairs, seed, hard_negatives=train.hard_negatives)  # raises now if there are too few
    connect(RaySettings())
    job = {
        "model": model,
        "train": train,
        "seed": seed,
        "pairs": Path(pairs).absolute(),
        "llm_path": absolute(llm_path),
        "vision_path": absolute(vision_path),
        "output": files.output,
        "negatives": negatives and Path(negatives).absolute(),
    }
    return publish(files, run_training(embedder_worker, job, train, files, wait_minutes=wait_minutes))


def embedder_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun

    job = EmbedderJob(**config["job"])
    return run_worker(
        lambda device, report: EmbedderRun(job, device, report), RunFiles(job.output), job.train, config["resume_from"]
    )
