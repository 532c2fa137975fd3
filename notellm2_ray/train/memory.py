"""What a rank of a training run needs in memory, from the sizes of its network and the settings of its engine.

In bytes for each trained number, with float32 weights and AdamW, for N ranks:

              weights  master copies  gradients  moments
plain, ZeRO-0       4              0          4        8
ZeRO-1              4            4/N          4      8/N
ZeRO-2              4            4/N        4/N      8/N
ZeRO-3            4/N            4/N        4/N      8/N

ZeRO-3's master copies are equal to its weights. DeepSpeed 0.19 means to leave them out, but compares a device with its
name, which are never equal. DeepSpeed's own estimators (``estimate_zero2_model_states_mem_needs``, ``..zero3..``) count
2 + 18/N and 18/N bytes, for weights and gradients in 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from notellm2_ray.core.settings.train import TrainSettings

if TYPE_CHECKING:
    from notellm2_ray.models.footprint import Footprint

_BUCKET = 200_000_000  # numbers in a bucket of gradients (train/zero.py)
_LIVE = 1_000_000_000  # numbers that ZeRO-3 gathers at most at a time (stage3_max_live_parameters)


class Load(NamedTuple):
    """What passes through a rank at once.

    Attributes:
        samples: that keep their activations until the backward pass.
        group: that go through a layer together.
        accumulates: whether gradients are added up over several backward passes, so that they are there beside
            activations.
        extra: bytes of further activations, such as logits.
    """

    samples: int
    group: int
    accumulates: bool = False
    extra: int = 0


class Memory(NamedTuple):
    """Bytes, by what they are for.

    Attributes:
        device: of a rank, on its GPU (on a CPU: in the host's memory).
        peak: of them at once. Without ZeRO-3 gradients come as activations go.
        host: of a rank, in the host's memory.
    """

    device: dict[str, int]
    peak: int
    host: dict[str, int]


def training_memory(sizes: Footprint, train: TrainSettings, load: Load) -> Memory:
    """The memory of one rank."""
    stage = train.zero_stage if train.engine == "deepspeed" else 0
    ranks, bf16 = train.num_workers, train.precision in ("auto", "bf16")
    offload = train.offload if train.gpus_per_worker else "none"
    whole, share = 4 * sizes.trained, -(-4 * sizes.trained // ranks)

    weights = whole + sizes.frozen if stage < 3 else share + -(-sizes.frozen // ranks)
    master = share if stage else 0
    gradients = share if stage >= 2 else whole
    moments = 2 * (share if stage else whole)
    device, host = {"weights": weights}, {}
    if offload == "parameters_and_optimizer":
        host["weights"] = device.pop("weights")
    if offload != "none":
        # Gradients twice: as they arrive, and as the optimizer takes them.
        host |= {"master copies": master, "gradients": 2 * share, "optimizer moments": moments}
        master = moments = 0
        gradients = gradients if stage == 1 else 0
    device |= {"master copies": master, "gradients": gradients, "optimizer moments": moments}
    device["buffers"] = _buffers(sizes, stage, bf16) if train.engine == "deepspeed" else 0

    # ZeRO-3 gathers weights in bfloat16, so that no copies are made.
    copies = sizes.copies if bf16 and stage < 3 else 0
    if train.gradient_checkpointing:
        activations = load.samples * sizes.recomputed + load.group * sizes.layer
    else:
        activations = load.samples * sizes.kept
    device |= {"bfloat16 copies": copies, "activations": activations + load.extra}

    in_turn = gradients, copies + activations + load.extra
    together = stage == 3 or load.accumulates
    peak = sum(device.values()) - (0 if together else min(in_turn))
    return Memory({name: size for name, size in device.items() if size}, peak, host)


def _buffers(sizes: Footprint, stage: int, bf16: bool) -> int:
    """DeepSpeed's buckets of gradients, and the weights that ZeRO-3 has gathered."""
    bucket = min(_BUCKET, sizes.trained)
    if stage < 3:
        return 4 * bucket if stage else 0
    return (6 if bf16 else 4) * bucket + (2 if bf16 else 4) * min(_LIVE, sizes.parameters)
