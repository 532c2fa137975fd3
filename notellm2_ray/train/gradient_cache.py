"""Gradient caching (GradCache: Gao et al. 2021, arXiv 2101.06983): a large batch in passes, with the memory of one.

1. Every pass gives its notes' vectors. Only the last pass keeps its activations.
2. The loss over the vectors of all passes and ranks gives the gradients of this rank's vectors and of the temperature.
3. Every other pass runs again, with the same dropout. The backward pass of each starts from its vectors' gradients.

Instead of three times a forward pass's operations, a step takes nearly four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from notellm2_ray.models.embedder.vectors import NoteVectors, join_vectors
from notellm2_ray.train.batches import PreparedNotes
from notellm2_ray.train.engine import Engine
from notellm2_ray.train.step import StepOutput


def begin_step(
    engine: Engine, notes: PreparedNotes, note_keys: torch.Tensor, *more: Any, cached: bool
) -> tuple[StepOutput, Callable[[float], None]]:
    """The result of a step before its update, and a function that updates the weights with a learning rate factor.

    Args:
        engine: around an :class:`~notellm2_ray.train.step.EmbedderStep`.
        note_keys, more: see :class:`~notellm2_ray.train.step.EmbedderStep`; the keys are on the engine's device.
        cached: whether each group of ``notes`` goes through the model in a pass of its own.
    """
    if cached:
        step = CachedStep(engine, notes.evened(), note_keys.device)
        return step.forward(note_keys, *more), step.update
    out = engine(notes.groups, notes.positions.to(note_keys.device), note_keys, *more)
    return out, lambda factor: engine.update(out.loss, factor)


class CachedStep:
    """A step whose groups of notes go through the model one after the other, in as many passes on every rank."""

    def __init__(self, engine: Engine, notes: PreparedNotes, device: torch.device) -> None:
        self._engine, self._notes, self._device = engine, notes, device
        self._last = len(notes.groups) - 1
        self._seeds = pass_seeds(len(notes.groups))

    def forward(self, note_keys: torch.Tensor, *more: Any) -> StepOutput:
        """The result of the whole step. Its loss has no graph."""
        with torch.no_grad():
            parts = [self._vectors(number) for number in range(self._last)]
        self._kept = self._vectors(self._last, final=self._last == 0)
        parts.append(_detached(self._kept))
        whole = _detached(join_vectors(parts))
        inputs = [*whole.named.values(), whole.temperature]
        for tensor in inputs:
            tensor.requires_grad_()
        in_order = whole.rows(self._notes.positions.to(self._device))
        out = self._engine.module.output(in_order, note_keys, *more)
        *gradients, self._of_temperature = torch.autograd.grad(out.loss, inputs, materialize_grads=True)
        self._gradients = list(zip(*(gradient.split(self._notes.sizes) for gradient in gradients), strict=True))
        return out._replace(loss=out.loss.detach())

    def update(self, factor: float) -> None:
        """The backward passes, and the update of the weights."""
        loss = self._with_gradients(self._kept, self._last)
        del self._kept
        for number in range(self._last):
            self._engine.accumulate(loss)
            loss = self._with_gradients(self._vectors(number, final=number == self._last - 1), number)
        self._engine.update(loss, factor)

    def _vectors(self, number: int, *, final: bool = False) -> NoteVectors:
        """The vectors of a pass, always with the same dropout; ``final``: the weights are updated after this pass."""
        torch.manual_seed(self._seeds[number])
        in_order = torch.arange(self._notes.sizes[number], device=self._device)
        return self._engine([self._notes.groups[number]], in_order, last=final)

    def _with_gradients(self, vectors: NoteVectors, number: int) -> torch.Tensor:
        """A scalar whose gradients are those of the step's loss. It depends on everything that the pass computed."""
        # The temperature gets its gradient once. As a function of it, every pass has the same parameters.
        total = vectors.temperature * (self._of_temperature if number == self._last else 0.0)
        for values, gradient in zip(vectors.named.values(), self._gradients[number], strict=True):
            total = total + (values * gradient).sum()
        return total


def pass_seeds(num_passes: int) -> list[int]:
    """Seeds of the passes' dropout, drawn from PyTorch's generator, which a run seeds by step and rank."""
    return torch.randint(2**62, (num_passes,)).tolist()


def _detached(vectors: NoteVectors) -> NoteVectors:
    named = {name: values.detach() for name, values in vectors.named.items()}
    return NoteVectors(named, vectors.present, vectors.temperature.detach())
