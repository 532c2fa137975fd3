"""The training loop that every rank runs."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train import distributed
from notellm2_ray.train.batches import NotePreparer, PreparedNotes, prefetched
from notellm2_ray.train.checkpoints import RunFiles, State, begin_checkpoint, read_state, write_state
from notellm2_ray.train.contrastive import ContrastiveStep, StepOutput
from notellm2_ray.train.engine import make_engine
from notellm2_ray.train.history import History, Progress, open_logger
from notellm2_ray.train.sampler import PairBatch, Pairs, PairSampler
from notellm2_ray.train.schedule import learning_rate_factor, num_steps
from notellm2_ray.train.validation import Score, Validation

log = logging.getLogger("notellm2_ray")


class Job(NamedTuple):
    """What a rank needs to know."""

    model: ModelSettings
    train: TrainSettings
    seed: int
    pairs: Path
    llm_path: str
    vision_path: str
    output: Path


class Trainer:
    """One rank of a training run."""

    def __init__(self, job: Job, device: torch.device, report: Callable[[Path, dict[str, Any]], None]) -> None:
        """Build everything; the same weights on every rank.

        Args:
            report: is told of a checkpoint's directory and figures, on every rank, once all of it is written.
        """
        from notellm2_ray.models.build import build_encoder
        from notellm2_ray.models.device import multiplies_bf16

        if job.train.precision == "auto":
            precision = "bf16" if multiplies_bf16(device) else "fp32"
            job = job._replace(train=job.train.model_copy(update={"precision": precision}))
        self.job, self.settings, self.device, self._report = job, job.train, device, report
        self.files = RunFiles(job.output)
        self.encoder = build_encoder(job.model, job.seed, llm_path=job.llm_path, vision_path=job.vision_path)
        self.module = _module(self.encoder.model, job)
        self.engine = make_engine(self.module, job.train, device)
        self._read_data()
        self.total = num_steps(job.train, self.sampler.steps_per_epoch)
        self.state = State()
        self._reported: list[State] = []

    def _read_data(self) -> None:
        settings, seed, directory = self.settings, self.job.seed, self.job.pairs
        pairs = Pairs(directory / "train.parquet")
        store = NoteStore(directory / "train_notes.arrow")
        self.sampler = PairSampler(pairs, settings.batch_pairs, seed, distributed.rank(), distributed.world_size())
        self.prepare = NotePreparer(store, self.encoder.preprocessor, settings.length_chunks)
        self.validation = Validation(
            Pairs(directory / "valid.parquet"),
            self.prepare,
            max_pairs=settings.max_validation_pairs,
            batch_pairs=settings.batch_pairs,
            seed=seed,
            prefetch=settings.prefetch_batches,
        )

    def resume(self, checkpoint: Path) -> None:
        """Go on after ``checkpoint``."""
        self.state = read_state(checkpoint)
        self.engine.load(checkpoint)
        self._reported = [self.state]
        if distributed.rank() == 0:
            log.info("continuing after step %d", self.state.step)

    def run(self) -> dict[str, Any]:
        """Train to the end; the run's figures on rank 0."""
        first = distributed.rank() == 0
        history = History(self.files.history, self.state.step) if first else None
        name = self.settings.logger if first else "none"
        add_to_log, close_log = open_logger(name, self.job.output, to_plain(self.settings), self.state.step)
        progress = Progress(self.state.step, self.total, 2 * self.settings.batch_pairs)
        self.module.train()
        for step, batch, notes in prefetched(self._batch, range(self.state.step, self.total), self._depth):
            progress.begin()
            loss, temperature = self._train(step, batch, notes.to(self.device))
            self.state = self.state.model_copy(update={"step": step + 1})
            speed = progress.end(step + 1, loss, quiet=not first)
            row = {"step": step + 1, "loss": loss, "lr": self._factor(step) * self.settings.learning_rate}
            row |= {"temperature": temperature, "notes_per_s": round(speed, 1)}
            rows = [row, *self._after_step()]
            if history is not None:
                for row in rows:
                    history.add(row)
                    add_to_log(row)
            self._checkpoint_if_due()
        close_log()
        if history is not None:
            history.close()
        self._keep_something()
        return self._figures(history, progress)

    @property
    def _depth(self) -> int:
        return self.settings.prefetch_batches

    def _batch(self, step: int) -> tuple[int, PairBatch, PreparedNotes]:
        batch = self.sampler[step]
        return step, batch, self.prepare(batch.note_ids)

    def _factor(self, step: int) -> float:
        return learning_rate_factor(step, self.total, self.settings.warmup_ratio)

    def _train(self, step: int, batch: PairBatch, notes: PreparedNotes) -> tuple[float, float]:
        """One update; the loss of the whole batch before it, and the temperature."""
        # Dropout follows from the step, so that a resumed run drops what an undisturbed one does.
        torch.manual_seed(stream_seed(self.job.seed, "train", "dropout", step, distributed.rank()))
        out = self.engine(notes.groups, notes.positions, torch.from_numpy(batch.note_keys).to(self.device))
        loss = distributed.mean_over_ranks(out.loss)
        if not math.isfinite(loss):
            raise _not_finite(step, loss, out, notes)
        self.engine.update(out.loss, self._factor(step))
        return loss, float(out.temperature)

    def _after_step(self) -> list[dict[str, Any]]:
        """Validate if it is time to; the rows to log."""
        step = self.state.step
        if not len(self.validation) or (step % self.settings.validate_every_steps and step < self.total):
            return []
        score = self.validation.score(self.module, self.job.model.alpha, self.device)
        if distributed.rank() == 0:
            log.info("step %d/%d: validation recall@10 %.4f, loss %.4f", step, self.total, score.recall, score.loss)
        if self._is_better(score):
            self._save_best(score)
        return [{"step": step, "valid_loss": score.loss, "valid_recall": score.recall}]

    def _is_better(self, score: Score) -> bool:
        if self.state.best_step is None:
            return True
        by_recall = (-score.recall, score.loss) < (-(self.state.best_recall or 0.0), self.state.best_loss)
        return by_recall if self.settings.best_by == "recall" else score.loss < (self.state.best_loss or math.inf)

    def _save_best(self, score: Score | None) -> None:
        from notellm2_ray.models.encoder import save_weights

        weights = self.engine.state_dict()
        if weights is not None:
            directory = self.files.best(self.state.step)
            save_weights(weights, directory)
            self.encoder.save_description(directory)
        figures = {"best_recall": score.recall, "best_loss": score.loss} if score else {}
        self.state = self.state.model_copy(update={"best_step": self.state.step, **figures})
        distributed.barrier()

    def _keep_something(self) -> None:
        """Without validation pairs the last weights are the best there are."""
        if self.state.best_step is None:
            self._save_best(None)

    def _checkpoint_if_due(self) -> None:
        step = self.state.step
        if step % self.settings.checkpoint_every_steps or step == self.total:
            return
        directory = self.files.checkpoint(step)
        if distributed.rank() == 0:
            begin_checkpoint(directory)
        distributed.barrier()
        self.engine.save(directory)
        distributed.barrier()
        if distributed.rank() == 0:
            write_state(directory, self.state)
        self._report(directory, {"step": step})
        # Ray takes note of a checkpoint a little after it is told; a run killed before that resumes from an earlier
        # one, whose best weights must still be there.
        self._reported = [*self._reported[-2:], self.state]
        if distributed.rank() == 0:
            self.files.keep_best(state.best_step for state in self._reported)

    def _figures(self, history: History | None, progress: Progress) -> dict[str, Any]:
        if history is None:
            return {}
        losses = [row["loss"] for row in history.rows if "loss" in row]
        return {
            "steps": self.total,
            "pairs": len(self.sampler.pairs),
            "validation_pairs": len(self.validation),
            "best_step": self.state.best_step,
            "best_recall": self.state.best_recall,
            "final_loss": losses[-1],
            "notes_per_s": round(progress.notes_per_s(self.total), 1),
        }


def _module(model: Any, job: Job) -> ContrastiveStep:
    settings = job.train
    model.set_gradient_checkpointing(settings.gradient_checkpointing)
    # A sharded model whose activations are recomputed must not keep every weight a second time, cast to bfloat16.
    lean = settings.engine == "deepspeed" and settings.zero_stage == 3 and settings.gradient_checkpointing
    return ContrastiveStep(
        model,
        alpha=job.model.alpha,
        mask_duplicates=settings.mask_duplicates,
        bf16=settings.precision == "bf16",
        cache_casts=not lean,
    )


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


def prepare_process(cpus: float) -> None:
    """Set up a worker process: threads, search path of compilers, no chatter in the log."""
    torch.set_num_threads(max(1, int(cpus)))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja lies there
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO, for every library
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
