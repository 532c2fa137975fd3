"""Tuning the ranker as a stage: a Ray Train run from examples to an adapter and a model with the adapter merged in."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from notellm2_ray.core.settings import RaySettings
from notellm2_ray.core.settings.ranking import PromptLanguage, RankerSettings, TuneSettings
from notellm2_ray.train.checkpoints import RunFiles, publish
from notellm2_ray.train.launch import absolute, run_training, run_worker

log = logging.getLogger("notellm2_ray")


def train_ranker(
    ranker: RankerSettings,
    tune: TuneSettings,
    *,
    model_path: str,
    sequences: Path,
    notes: Path,
    preferences: Path | None,
    output: Path,
    language: PromptLanguage = "en",
    max_model_len: int | None = None,
    wait_minutes: float = 0,
) -> dict[str, Any]:
    """Tune a ranker with LoRA on Ray Train; continues a run that was stopped in ``output``.

    Args:
        model_path: the model that ``ranker.model`` names.
        sequences: directory with {train,valid}.parquet (EXAMPLE_SCHEMA) and candidates/{train,valid}.parquet
            (CANDIDATE_SCHEMA), on storage that every worker sees. Each candidate is a question; every epoch has the
            same questions.
        notes: prepared notes, a directory of Parquet files (NOTE_SCHEMA).
        preferences: PREFERENCE_SCHEMA; None for ``tallrec``.
        output: gets ``adapter/`` (peft; the weights with the best validation AUC, or the last ones without validation
            examples), ``model/`` (the whole model with the adapter merged in, which vLLM loads), ``history.jsonl``
            ({step, loss, lr, prompts_per_s} after every step, {step, valid_loss, valid_auc} after every validation)
            and, if candidates have no note, ``quarantine/``.
        language: of the prompts.
        max_model_len: the most tokens of a prompt and its answer for the engines that will score; None: not checked.
        wait_minutes: how long a cluster that was joined has to grow, if it has no room for all workers.

    Returns:
        steps, prompts, quarantined, without_preference (examples with a history but no preference, treated as users
        without a history), best_step, best_auc, final_loss, trained_parameters, prompts_per_s, and how validations were
        made: validate_every_steps, validation_examples (targets) and validation_prompts (with their negatives).

    Raises:
        ConfigError: the cluster is too small, or prompts can be longer than ``max_model_len``.
        DataError: a table or an image is missing or unusable.
        ModelError: the model cannot be read, or reads no images but is shown some, or the loss is not finite.
        ray.train.TrainingFailedError: workers failed more often than ``tune.max_failures``.
    """
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.train.ranker_data import RankerFiles, check_rows, gather_notes
    from notellm2_ray.train.ranker_run import RankerJob, train_settings

    files = RunFiles(Path(output).absolute(), "adapter")
    finished = files.result.exists()
    if not finished:
        _check_prompts(absolute(model_path), ranker, language, max_model_len)
    connect(RaySettings())
    if finished:
        return _finish(files, {}, model_path, tune)
    data = RankerFiles(
        Path(sequences).absolute(),
        None if preferences is None else Path(preferences).absolute(),
        files.root / "notes.arrow",
    )
    gather_notes(data, Path(notes).absolute(), ranker)
    counts = check_rows(data, ranker, tune, files.output)
    log.info("train-ranker: %d prompts", counts["prompts"])
    job = RankerJob(ranker, tune, absolute(model_path), data, files.output, language)
    result = run_training(ranker_worker, job._asdict(), train_settings(tune), files, "tune", wait_minutes)
    return _finish(files, {**counts, **result}, model_path, tune)


def _check_prompts(model: str, ranker: RankerSettings, language: PromptLanguage, max_model_len: int | None) -> None:
    """Raise an error now if scoring could not ask the tuned model what it was tuned for."""
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.processors import load_processor
    from notellm2_ray.models.ranker.inputs import RankerPrompter
    from notellm2_ray.models.ranker.room import check_ranker
    from notellm2_ray.models.weight_names import check_weight_names

    check_weight_names(Path(model))
    processor = load_processor(model)
    prompter = RankerPrompter(ChatTokenizer.of(processor), ranker, language)
    check_ranker(prompter, processor, model, max_model_len or sys.maxsize)


def ranker_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    from notellm2_ray.train.ranker_run import RankerJob, RankerRun, train_settings

    job = RankerJob(**config["job"])
    return run_worker(
        lambda device, report: RankerRun(job, device, report),
        RunFiles(job.output, "adapter"),
        train_settings(job.tune),
        config["resume_from"],
    )


def _finish(files: RunFiles, result: dict[str, Any], model_path: str, tune: TuneSettings) -> dict[str, Any]:
    """Publish the adapter and merge it. It can be called again after a kill at any point, with the same outcome."""
    import ray

    result = publish(files, result)
    merged = files.output / "model"
    if not merged.exists():
        # On any machine with free CPUs: the driver's may be small.
        task = ray.remote(num_cpus=tune.cpus_per_worker, max_retries=1)(_merge)
        ray.get(task.remote(absolute(model_path), files.model, merged))
    return result


def _merge(base: str, adapter: Path, directory: Path) -> None:
    from notellm2_ray.models.ranker.model import merge_adapter

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merge_adapter(base, adapter, partial)
    partial.rename(directory)
