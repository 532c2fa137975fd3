"""Proves of a loaded tower that its states are those of square patches, and finds the parameters that nothing uses."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.models.vision import families
from notellm2_ray.models.vision.tower import VisionTower

_REGISTERS = ("num_register_tokens", "num_registers")
_CLASS_TOKENS = ("num_cls_tokens", "n_cls_tokens")
# What networks raise for an input that is not theirs: a wrong shape, a missing argument, an output without states.
_UNLIKE = (ValueError, RuntimeError, TypeError, AttributeError, IndexError, AssertionError, NotImplementedError)


def check_sizes(config: Any, name: str) -> None:
    """Raise :class:`ModelError` if a configuration has no width, or no square patches."""
    lacks = [key for key in ("hidden_size", "patch_size") if families.side(getattr(config, key, None)) is None]
    if lacks:
        raise ModelError(
            f"{name} is a {config.model_type}, whose configuration has no {' and no '.join(lacks)}: it gives no states "
            f"of square patches. {families.NEEDED}"
        )


def check_tower(tower: VisionTower, name: str) -> None:
    """Run a tower on one image. Its states must be those of the patches, after those of the tokens that it declares.

    Raises:
        ModelError: they are not; the message tells what there is instead.
    """
    config, size = tower.config, tower.image.size
    kind = f"{name} is a {config.model_type}"
    try:
        with torch.no_grad():
            output = tower.output(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            states = output.last_hidden_state
    except _UNLIKE as error:
        raise ModelError(
            f"{kind}, which does not take one image of {size} x {size} pixels, as its image processor makes: "
            f"{first_line(error)}. {families.NEEDED}"
        ) from error
    shape, patches = tuple(states.shape) if torch.is_tensor(states) else (), tower.num_patches
    if len(shape) != 3 or shape[2] != tower.width or shape[1] not in _lengths(tower):
        raise ModelError(
            f"{kind}, whose states of one image have the shape {shape}, not (1, {patches}, {tower.width}) besides CLS "
            f"and registers: they are not those of its {patches} square patches. {families.NEEDED}"
        )
    _check_pooling(tower, output, shape[1] - patches, name)


def _lengths(tower: VisionTower) -> list[int]:
    """Numbers of states that the configuration allows: patches, registers, and no, one (CLS) or two class tokens."""
    registers, classes = (
        next((getattr(tower.config, key) for key in keys if hasattr(tower.config, key)), None)
        for keys in (_REGISTERS, _CLASS_TOKENS)
    )
    counts = [0, 1, 2] if classes is None else [0, classes]
    return [tower.num_patches + (registers or 0) + count for count in counts] + [tower.num_patches]


def _check_pooling(tower: VisionTower, output: Any, others: int, name: str) -> None:
    pooled = getattr(output, "pooler_output", None)
    if tower.pooling == "cls" and not others:
        raise ModelError(f"{name} has no CLS token: model.vision_pooling can be auto or mean")
    if (
        tower.pooling == "projected"
        and tower.projection is None
        and (pooled is None or "siglip" not in tower.config.model_type)
    ):
        raise ModelError(
            f"{name} has no projection into a space that it shares with texts (visual_projection): "
            "model.vision_pooling=projected is for a CLIP with its projection, or a SigLIP"
        )
    if tower.pooling == "auto" and pooled is not None and pooled.shape[1:] != (tower.width,):
        raise ModelError(
            f"{name} pools its states to {tuple(pooled.shape[1:])}, not to its width of {tower.width}: set "
            "model.vision_pooling to cls or mean"
        )


def unused_parameters(tower: VisionTower) -> list[str]:
    """Names of the parameters that neither the patches nor the pooled vector depend on, such as a mask token.

    In training they would get no gradient, which data parallelism rejects.
    """
    trained = [(name, value) for name, value in tower.named_parameters() if value.requires_grad]
    size, training = tower.image.size, tower.training
    with torch.enable_grad():
        views = tower.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    tower.train(training)
    used: set[int] = set()
    nodes = {view.grad_fn for view in (views.patches, views.pooled if tower.pooling else views.patches)}
    waiting = deque(nodes)
    while waiting:
        node = waiting.popleft()
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in nodes:
                nodes.add(following)
                waiting.append(following)
    return [name for name, value in trained if id(value) not in used]
