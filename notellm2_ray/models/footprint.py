"""What a network needs in memory, found without loading it: its configuration's network runs on tensors without data.

Parameters are counted on the network itself. Activations are what PyTorch keeps of a forward pass for the backward
pass: on fake tensors every operation tells its result's shape and type, and nothing is computed. So any architecture,
adapter and precision is counted as it is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_SAMPLES = (2, 4)  # two sizes of a batch tell what grows with it from what does not


class Outline(NamedTuple):
    """How to make a network without weights and run it.

    Attributes:
        build: makes the network as it is trained, in training mode; called where new tensors have no data.
        run: (network, number of samples) -> anything that depends on all of its activations.
        layers: of the part that recomputes activations.
    """

    build: Callable[[], Any]
    run: Callable[[Any, int], Any]
    layers: int


class Footprint(NamedTuple):
    """Sizes of a network in training. A sample is a note, or a token of the ranker's prompts.

    Attributes:
        parameters: how many numbers it has.
        trained: how many of them are trained, in float32.
        frozen: bytes of the others.
        copies: bytes of the weights' copies in bfloat16 that a forward pass keeps.
        kept: bytes of activations that a sample keeps.
        recomputed: the same with ``gradient_checkpointing``.
        layer: of a sample's ``kept``, the part of one layer, which a recomputation makes again.
    """

    parameters: int
    trained: int
    frozen: int
    copies: int
    kept: int
    recomputed: int
    layer: int


def footprint(outline: Outline, *, bf16: bool, tokens: int = 1) -> Footprint:
    """The sizes of a network.

    Args:
        bf16: whether matrix work is in bfloat16 over float32 weights.
        tokens: the sizes of a sample are divided by this number, rounded up.
    """
    with torch.device("meta"):
        network = outline.build()
    with FakeTensorMode():
        _pretend(network)
        parameters = list(network.parameters())
        network.set_gradient_checkpointing(False)
        copies, kept = _line(network, outline, bf16)
        network.set_gradient_checkpointing(True)
        _, recomputed = _line(network, outline, bf16)
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    frozen = sum(one.numel() * one.element_size() for one in parameters if not one.requires_grad)
    kept, recomputed = -(-kept // tokens), -(-recomputed // tokens)
    layer = -(-kept // max(1, outline.layers))
    return Footprint(sum(one.numel() for one in parameters), trained, frozen, copies, kept, recomputed, layer)


def _pretend(network: Any) -> None:
    """Replace weights on the meta device, which autocast leaves alone, by fake ones on the CPU."""
    made: dict[int, Any] = {}
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.forward = partial(_dropout, module)  # type: ignore[method-assign]
        for tensors in (module._parameters, module._buffers):
            for name, one in tensors.items():
                if one is not None and id(one) not in made:
                    fake = torch.empty(one.shape, dtype=one.dtype, device="cpu")
                    is_weight = isinstance(one, torch.nn.Parameter)
                    made[id(one)] = torch.nn.Parameter(fake, one.requires_grad) if is_weight else fake
                if one is not None:
                    tensors[name] = made[id(one)]


def _dropout(module: torch.nn.Dropout, values: torch.Tensor) -> torch.Tensor:
    """Dropout as on a GPU, which keeps a byte for each number; on a CPU it would keep the factors."""
    return torch.native_dropout(values, module.p, True)[0] if module.p else values


def _line(network: Any, outline: Outline, bf16: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps whatever its size, and those that each sample adds."""
    few, many = (saved_bytes(network, partial(outline.run, network, count), bf16) for count in _SAMPLES)
    each = (many - few) // (_SAMPLES[1] - _SAMPLES[0])
    return max(0, few - _SAMPLES[0] * each), each


def saved_bytes(network: Any, forward: Callable[[], Any], bf16: bool) -> int:
    """Bytes that a forward pass keeps for its backward pass, besides the parameters."""
    own = {one.untyped_storage()._cdata for one in network.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        result = forward()
    total = sum(one.untyped_storage().nbytes() for place, one in saved.items() if place not in own)
    del result
    return total
