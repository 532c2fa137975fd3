"""Training an embedder: a :class:`~notellm2_ray.train.run_loop.TrainingRun` on pairs of notes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train import distributed
from notellm2_ray.train.batches import NotePreparer, PreparedNotes
from notellm2_ray.train.checkpoints import RunFiles
from notellm2_ray.train.engine import num_trained
from notellm2_ray.train.engines import make_engine
from notellm2_ray.train.gradient_cache import begin_step
from notellm2_ray.train.objectives import Loss, loss_of
from notellm2_ray.train.one_load import build_once
from notellm2_ray.train.pairs import PairBatch, Pairs
from notellm2_ray.train.plateau import Plateau
from notellm2_ray.train.rates import num_pretrained, with_rates
from notellm2_ray.train.readers import num_readers
from notellm2_ray.train.run_loop import Report, TrainingRun, resolved_precision
from notellm2_ray.train.sampler import PairSampler
from notellm2_ray.train.schedule import num_steps
from notellm2_ray.train.step import EmbedderStep, StepOutput
from notellm2_ray.train.validation import Validation, ValidationScore

if TYPE_CHECKING:
    from notellm2_ray.models.embedder.encoder import NoteEncoder

log = logging.getLogger("notellm2_ray")


class EmbedderJob(NamedTuple):
    """What a rank needs to know."""

    model: ModelSettings
    train: TrainSettings
    seed: int
    pairs: Path
    llm_path: str
    vision_path: str
    output: Path
    negatives: Path | None = None  # see Pairs


class EmbedderRun(TrainingRun[tuple[PairBatch, PreparedNotes]]):
    """One rank of an embedder's training run."""

    stage, unit = "train-embedder", "notes"

    def __init__(self, job: EmbedderJob, device: torch.device, report: Report) -> None:
        """Build everything, from weights that rank 0 loads.

        Args:
            report: called on every rank with a checkpoint's directory and figures, when it is complete.
        """
        job = job._replace(train=resolved_precision(job.train, device))
        super().__init__(RunFiles(job.output), job.train, job.seed, device, report)
        from notellm2_ray.models.embedder.encoder import NoteEncoder

        parts, pretrained = build_once(lambda: _parts_to_train(job, device))
        self.encoder = NoteEncoder(*parts)
        self._choose_rates(pretrained)
        self.job = job = job._replace(train=self.settings)
        self.loss = loss_of(job.model, job.train)
        self.module = _module(self.encoder.model, self.loss, job)
        self._num_trained = num_trained(self.module)
        self.engine = make_engine(self.module, job.train, device, loaded_once=distributed.world_size() > 1)
        self._read_data()
        self.total = num_steps(job.train, self.sampler.steps_per_epoch)
        self._plateau = Plateau(job.train.batch_pairs, self.total, job.train.hard_negatives)
        self.per_step = (2 + job.train.hard_negatives) * job.train.batch_pairs

    def _choose_rates(self, size: int) -> None:
        given = self.settings
        self.settings = with_rates(given, size)
        if self.settings != given and distributed.rank() == 0:
            chosen = self.settings.learning_rate, self.settings.connector_learning_rate
            words = "%s: learning rate %.2g, of new parts %.2g, by the size of the pretrained models (%.3g million)"
            log.info(words, self.stage, *chosen, size / 1e6)

    def _read_data(self) -> None:
        settings, seed, directory = self.settings, self.job.seed, self.job.pairs
        pairs = Pairs(directory / "train.parquet", self.job.negatives)
        store = NoteStore(directory / "train_notes.arrow")
        self.sampler = PairSampler(
            pairs, settings.batch_pairs, seed, distributed.rank(), distributed.world_size(), settings.hard_negatives
        )
        self.prepare_notes = NotePreparer(
            store,
            self.encoder.preprocessor,
            settings.length_chunks,
            max_notes=settings.cached_notes_per_pass,
            max_tokens=settings.cached_tokens_per_pass,
            readers=num_readers(settings, self.device),
        )
        self.readers = self.prepare_notes.readers
        self.validation = Validation(
            Pairs(directory / "valid.parquet"),
            self.prepare_notes,
            max_pairs=settings.max_validation_pairs,
            batch_pairs=settings.batch_pairs,
            loss=self.loss,
            seed=seed,
            prefetch=settings.prefetch_batches,
        )

    def prepare(self, step: int) -> tuple[PairBatch, PreparedNotes]:
        batch = self.sampler[step]
        return batch, self.prepare_notes(batch.note_ids)

    def train(self, step: int, prepared: tuple[PairBatch, PreparedNotes]) -> dict[str, Any]:
        batch, notes = prepared
        keys = torch.from_numpy(batch.note_keys).to(self.device)
        out, update = begin_step(self.engine, notes, keys, batch.negatives, cached=self.settings.caches_gradients)
        loss = distributed.mean_over_ranks(out.loss)
        if not math.isfinite(loss):
            raise _not_finite(step, loss, out, notes)
        update(self.factor(step))
        if (warning := self._plateau.warning(step, loss)) and distributed.rank() == 0:
            log.warning("%s: %s", self.stage, warning)
        return {"loss": loss, "temperature": float(out.temperature)}

    def validate(self) -> dict[str, Any] | None:
        if not len(self.validation):
            return None
        score = self.validation.score(self.module, self.device)
        if distributed.rank() == 0:
            step = self.state.step
            figures = f"recall@10 {score.recall:.4f}, loss {score.loss:.4f}"
            log.info("%s: step %d / %d, validation %s", self.stage, step, self.total, figures)
        if self._is_better(score):
            self.keep(best_score=score.recall, best_loss=score.loss)
        return {"valid_loss": score.loss, "valid_recall": score.recall}

    def _is_better(self, score: ValidationScore) -> bool:
        if self.state.best_step is None:
            return True
        by_recall = (-score.recall, score.loss) < (-(self.state.best_score or 0.0), self.state.best_loss)
        return by_recall if self.settings.best_by == "recall" else score.loss < (self.state.best_loss or math.inf)

    def write_weights(self, directory: Path) -> None:
        from notellm2_ray.models.embedder.adapt import save_merged
        from notellm2_ray.models.embedder.encoder import save_weights

        lora = self.settings.lora
        weights = self.engine.state_dict(trained_only=lora is not None)
        if weights is None:
            return
        if lora is not None:
            # Frozen weights may be in bfloat16 here, or divided among the ranks: they are read once more.
            save_merged(_encoder(self.job), lora, weights, directory)
        else:
            save_weights(weights, directory)
            self.encoder.save_description(directory)

    def figures(self) -> dict[str, Any]:
        return {
            "pairs": len(self.sampler.pairs),
            "validation_pairs": len(self.validation),
            "best_recall": self.state.best_score,
            "learning_rate": self.settings.learning_rate,
            "trained_parameters": self._num_trained,
        }


def _encoder(job: EmbedderJob) -> NoteEncoder:
    """The embedder before any training, in float32."""
    from notellm2_ray.models.embedder.build import build_encoder

    encoder = build_encoder(job.model, job.seed, llm_path=job.llm_path, vision_path=job.vision_path)
    encoder.trained_dimensions = _fitting(job.train.dimensions, encoder.embedding_dim)
    return encoder


def _parts_to_train(job: EmbedderJob, device: torch.device) -> tuple[tuple[Any, Any, tuple[int, ...]], int]:
    """The arguments of the embedder, with LoRA if that is trained, and the size of its pretrained models."""
    encoder = _encoder(job)
    if device.type == "cpu":
        _train_eagerly(encoder)
    size = num_pretrained(encoder.model)
    if job.train.lora is not None:
        _adapt(encoder, job)
    return (encoder.model, encoder.preprocessor, encoder.trained_dimensions), size


def _adapt(encoder: NoteEncoder, job: EmbedderJob) -> None:
    from notellm2_ray.models.embedder.adapt import adapt_llm
    from notellm2_ray.models.lora import store_frozen_linears_in_bf16

    assert job.train.lora is not None
    adapted = adapt_llm(encoder, job.train.lora, job.seed)
    if job.train.precision == "bf16":
        store_frozen_linears_in_bf16(adapted)


def _train_eagerly(encoder: NoteEncoder) -> None:
    """Let the LLM train with the attention whose backward pass is the faster one on a CPU."""
    from notellm2_ray.models.embedder.kinds import kind_of
    from notellm2_ray.models.llm import attend_eagerly

    name = kind_of(encoder.settings).adapted(encoder.settings)
    if name is not None:
        attend_eagerly(encoder.model.get_submodule(name))


def _module(model: Any, loss: Loss, job: EmbedderJob) -> EmbedderStep:
    settings = job.train
    model.set_gradient_checkpointing(settings.gradient_checkpointing)
    # A sharded model with recomputed activations must not keep a second copy of every weight, cast to bfloat16.
    lean = settings.engine == "deepspeed" and settings.zero_stage == 3 and settings.gradient_checkpointing
    return EmbedderStep(model, loss=loss, bf16=settings.precision == "bf16", cache_casts=not lean)


def _fitting(dimensions: tuple[int, ...], whole: int) -> tuple[int, ...]:
    """``train.dimensions``; where model.embedding_dim is null, only the model tells the length of a whole vector."""
    if dimensions and max(dimensions) != whole:
        raise ConfigError(
            f"train.dimensions={list(dimensions)}: the largest must be {whole}, as long as the vectors are"
        )
    return dimensions


def _not_finite(step: int, loss: float, out: StepOutput, notes: PreparedNotes) -> ModelError:
    mine = [note_id for note_id, finite in zip(notes.note_ids, out.finite.tolist(), strict=True) if not finite]
    wrong = sorted({note_id for part in distributed.gather_objects(mine) for note_id in part})
    if wrong:
        names = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        cause = f"the vectors of {len(wrong)} notes are not finite: {names}"
    else:
        cause = f"every vector is finite, but the temperature is {float(out.temperature):.3g}"
    return ModelError(
        f"step {step + 1}: the loss is {loss} ({cause}). Lower train.learning_rate, set train.precision=fp32, or look "
        "at these notes"
    )
