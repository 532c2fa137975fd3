"""The short training loop that the three tiny models share: AdamW, warm-up, cosine decay, progress in the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.progress import Progress
from notellm2_ray.models.device import multiplies_bf16

_WARMUP_SHARE = 0.1
_FINAL_SHARE = 0.05  # of the peak learning rate, at the end of the cosine


def fit(
    name: str, model: nn.Module, batch_loss: Callable[[int], Tensor], *, steps: int, learning_rate: float
) -> list[float]:
    """Minimise ``batch_loss(step)`` over the model's parameters, and log step, loss and time left.

    Args:
        name: of the model in the log lines.
        model: trained in place, in float32.
        batch_loss: the scalar loss of a step's batch; it chooses the batch, so the caller decides the order.
        steps: number of updates.
        learning_rate: peak of AdamW's learning rate.

    Returns:
        the loss of each step, before its update.
    """
    optimizer = torch.optim.AdamW(_groups(model), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_peak(step, steps))
    losses: list[float] = []
    progress = Progress(name, "steps", steps)
    model.train()
    for step in range(steps):
        loss = batch_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.add(text=f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread inside (also as a decorator).

    Sums are then computed in one order, so that the weights do not depend on the number of cores. This costs little: at
    these sizes a second thread saves at most a third of the time. Where other processes needed the cores, two threads
    that waited for each other at every product were four times as slow as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mixed_precision() -> AbstractContextManager:
    """Matrix products in bfloat16 where this CPU multiplies it natively (1.3 to 1.8 times as fast), else in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16())


def summarise(losses: list[float], started: float) -> dict[str, float]:
    """The figures that every training reports; ``last_loss`` is the mean over the last tenth of the steps."""
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "first_loss": round(losses[0], 4),
        "last_loss": round(sum(tail) / len(tail), 4),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _groups(model: nn.Module) -> list[dict]:
    """Parameter groups: weight decay for matrices, none for biases, norms and scalars."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def _share_of_peak(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
