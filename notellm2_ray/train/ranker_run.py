"""Tuning the ranker: a :class:`~notellm2_ray.train.run_loop.TrainingRun` on questions and their answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.settings.ranking import PromptLanguage, RankerSettings, TuneSettings
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.models.chat import ChatTokenizer, load_processor
from notellm2_ray.models.llm import attend_eagerly
from notellm2_ray.models.ranker.inputs import IGNORED, RankerBatch, RankerFeatures, RankerPreprocessor, RankerPrompter
from notellm2_ray.models.ranker.model import RankerModel, answer_loss, answer_probability, load_network
from notellm2_ray.train import distributed
from notellm2_ray.train.batches import prefetched
from notellm2_ray.train.checkpoints import RunFiles
from notellm2_ray.train.engine import num_trained
from notellm2_ray.train.engines import make_engine
from notellm2_ray.train.one_load import build_once
from notellm2_ray.train.ranker_data import (
    QuestionFeatures,
    QuestionPreparer,
    RankerFiles,
    RankerRows,
    length_groups,
    split_groups,
    validation_plan,
)
from notellm2_ray.train.readers import Readers, num_readers
from notellm2_ray.train.run_loop import Report, TrainingRun, resolved_precision
from notellm2_ray.train.sampler import StepSampler

log = logging.getLogger("notellm2_ray")


class RankerJob(NamedTuple):
    """What a rank needs to know."""

    ranker: RankerSettings
    tune: TuneSettings
    model_path: str
    files: RankerFiles
    output: Path
    language: PromptLanguage = "en"


class RankerStep(nn.Module):
    """The ranker and its loss, as one module for an engine."""

    def __init__(self, model: RankerModel, bf16: bool) -> None:
        super().__init__()
        self.model, self._bf16 = model, bf16

    def forward(self, batch: RankerBatch, ids: tuple[int, int] | None = None) -> Any:
        """The loss of :func:`answer_loss`; with the ids of Yes and No, every row's P(yes) (N,) instead."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self._bf16):
            if ids is None:
                return answer_loss(self.model, batch)
            return answer_probability(self.model, batch, *ids)


class RankerRun(TrainingRun[tuple[np.ndarray, list[RankerFeatures]]]):
    """One rank of a ranker's tuning."""

    stage, unit = "train-ranker", "prompts"

    def __init__(self, job: RankerJob, device: torch.device, report: Report) -> None:
        """Build everything, from weights that rank 0 loads."""
        tune, settings = job.tune, resolved_precision(train_settings(job.tune), device)
        super().__init__(RunFiles(job.output, "adapter"), settings, tune.seed, device, report)
        self.job, self.per_step = job, tune.batch_size
        bf16 = settings.precision == "bf16"
        self.ranker = build_once(lambda: _ranker(job, bf16, device))
        self.module = RankerStep(self.ranker, bf16)
        self.chat = ChatTokenizer.from_pretrained(job.model_path)
        prompter = RankerPrompter(self.chat, job.ranker, job.language)
        self.preprocessor = RankerPreprocessor(prompter, load_processor(job.model_path), tune.loss_on)
        self._blank = self.preprocessor.blank() if self._needs_blanks() else None
        self._num_trained = num_trained(self.module)
        self.engine = make_engine(self.module, settings, device, loaded_once=distributed.world_size() > 1)
        self._read_data()

    def _read_data(self) -> None:
        job, tune = self.job, self.job.tune
        rows, valid = (RankerRows(job.files, split, job.ranker) for split in ("train", "valid"))
        ranks = distributed.rank(), distributed.world_size()
        self.sampler = StepSampler(len(rows), tune.batch_size, tune.seed, *ranks)
        self.readers = Readers(QuestionFeatures(self.preprocessor), num_readers(self.settings, self.device))
        self._rows, self._prepare = rows, QuestionPreparer(rows, self.readers)
        self._prepare_valid = QuestionPreparer(valid, self.readers)
        steps = max(1, int(tune.epochs * self.sampler.steps_per_epoch))
        self.total = steps if tune.max_steps is None else min(steps, tune.max_steps)
        every, self._valid_rows = validation_plan(tune, self.total, valid)
        self._valid_labels = valid.labels[self._valid_rows]
        self.settings = self.settings.model_copy(update={"validate_every_steps": every})

    def prepare(self, step: int) -> tuple[np.ndarray, list[RankerFeatures]]:
        rows = self.sampler.rows(step)
        return rows, self._prepare(rows.tolist(), answered=True)

    def train(self, step: int, prepared: tuple[np.ndarray, list[RankerFeatures]]) -> dict[str, Any]:
        rows, features = prepared
        tokens = torch.tensor(sum(int((item.labels != IGNORED).sum()) for item in features))
        per_rank = distributed.mean_over_ranks(tokens)
        groups = list(self._groups(features))
        losses: list[torch.Tensor] = []
        finite: list[torch.Tensor] = []
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            total, each = self.engine(self._batch([features[place] for place in group]), last=last)
            loss = total / per_rank
            losses.append(loss.detach())
            finite.append(each[: len(group)])
            if not last:
                self.engine.accumulate(loss)
                continue
            mean = distributed.mean_over_ranks(torch.stack(losses).sum())
            if not math.isfinite(mean):
                raise self._not_finite(step, mean, rows[np.concatenate(groups)], torch.cat(finite))
            self.engine.update(loss, self.factor(step))
        return {"loss": mean}

    def validate(self) -> dict[str, Any] | None:
        if not len(self._valid_rows):
            return None
        self.module.eval()
        with torch.no_grad():
            scores = np.concatenate(list(self._scores()))[: len(self._valid_rows)]
        self.module.train()
        auc, loss = pooled_auc(scores, self._valid_labels), _log_loss(scores, self._valid_labels)
        if distributed.rank() == 0:
            figures = f"AUC {auc:.4f}, loss {loss:.4f}"
            log.info("%s: step %d / %d, validation %s", self.stage, self.state.step, self.total, figures)
        best = (-(self.state.best_score or 0.0), self.state.best_loss or math.inf)
        if self.state.best_step is None or (-auc, loss) < best:
            self.keep(best_score=auc, best_loss=loss)
        return {"valid_loss": loss, "valid_auc": auc}

    def write_weights(self, directory: Path) -> None:
        weights = self.engine.state_dict(trained_only=True)
        if weights is not None:
            self.ranker.save_adapter(directory, dict(weights), self.job.model_path)

    def figures(self) -> dict[str, Any]:
        return {
            "best_auc": self.state.best_score,
            "validation_prompts": len(self._valid_rows),
            "validation_examples": int(self._valid_labels.sum()),
            "validate_every_steps": self.settings.validate_every_steps,
            "trained_parameters": self._num_trained,
        }

    def _not_finite(self, step: int, loss: float, rows: np.ndarray, finite: torch.Tensor) -> ModelError:
        """The error of a step, which names the prompts at fault on all ranks.

        Args:
            rows, finite: (N,) of this rank.
        """
        shown = [self._rows.question(int(row))[0] for row in rows[~finite.cpu().numpy()]]
        mine = [f"note {one.note_id} of example {one.example_id}" for one in shown]
        wrong = sorted({name for part in distributed.gather_objects(mine) for name in part})
        cause = f" at {len(wrong)} prompt(s): {', '.join(wrong[:8])}" + (", ..." if len(wrong) > 8 else "")
        return ModelError(
            f"step {step + 1}: the loss is {loss}{cause if wrong else ''}. Lower tune.learning_rate, set "
            "tune.precision=fp32, or look at these notes"
        )

    def _needs_blanks(self) -> bool:
        """Whether every forward pass must use the vision tower, because other ranks wait for this one's shard of it."""
        sharded = self.settings.engine == "deepspeed" and self.settings.zero_stage == 3
        return sharded and distributed.world_size() > 1 and self.job.ranker.variant != "tallrec"

    def _groups(self, features: list[RankerFeatures]) -> list[list[int]]:
        """Places of the features in groups, one for each forward pass; every rank has as many groups."""
        own = length_groups([len(item.input_ids) for item in features], self.job.tune.max_batch_tokens)
        return split_groups(own, max(distributed.gather_objects(len(own))))

    def _batch(self, features: list[RankerFeatures]) -> RankerBatch:
        if self._blank is not None and not any(item.vision for item in features):
            features = [*features, self._blank]
        return self.preprocessor.collate(features).to(self.device)

    def _scores(self) -> Iterator[np.ndarray]:
        """P(yes) of the validation rows, in order and batch by batch, on every rank; the last row may be repeated."""
        world_size = distributed.world_size()
        share = max(1, min(self.job.tune.batch_size, len(self._valid_rows)) // world_size)
        begins = range(0, len(self._valid_rows), share * world_size)
        ids = (self.chat.yes_id, self.chat.no_id)

        def prepare(begin: int) -> list[RankerFeatures]:
            places = begin + distributed.rank() * share + np.arange(share)
            rows = self._valid_rows[np.minimum(places, len(self._valid_rows) - 1)]
            return self._prepare_valid(rows.tolist(), answered=False)

        for features in prefetched(prepare, begins, self.settings.prefetch_batches):
            own = torch.empty(share, device=self.device)
            for group in self._groups(features):
                own[group] = self.module(self._batch([features[place] for place in group]), ids)[: len(group)]
            yield distributed.gather_rows(own)[0].cpu().numpy()


def _ranker(job: RankerJob, bf16: bool, device: torch.device) -> RankerModel:
    # Frozen weights need no higher precision than their products.
    network = load_network(job.model_path, torch.bfloat16 if bf16 else torch.float32)
    if device.type == "cpu":
        attend_eagerly(network.get_decoder())
    return RankerModel(network, job.tune)


def train_settings(tune: TuneSettings) -> TrainSettings:
    """A tuning's settings in the form that the engines, Ray Train and the training loop take."""
    return TrainSettings(
        engine=tune.engine,
        zero_stage=tune.zero_stage,
        seed=tune.seed,
        num_workers=tune.num_workers,
        cpus_per_worker=tune.cpus_per_worker,
        gpus_per_worker=tune.gpus_per_worker,
        batch_pairs=tune.batch_size,
        learning_rate=tune.learning_rate,
        weight_decay=tune.weight_decay,
        warmup_ratio=tune.warmup_ratio,
        max_grad_norm=tune.max_grad_norm,
        precision=tune.precision,
        gradient_checkpointing=tune.gradient_checkpointing,
        checkpoint_every_steps=tune.checkpoint_every_steps,
        max_failures=tune.max_failures,
        readers=tune.readers,
    )


def pooled_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of all (positive, negative) pairs of rows in which the positive scores higher; ties count half.

    0.5 if there is no pair.
    """
    from scipy.stats import rankdata

    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return 0.5
    above = rankdata(scores)[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    likelihood = np.where(labels, scores, 1 - scores).astype(np.float64)
    return float(-np.log(np.maximum(likelihood, 1e-12)).mean())
