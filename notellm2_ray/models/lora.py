"""LoRA (Hu et al., 2022): each linear layer W of a language model computes W x + (alpha / rank) B A x.

Only A and B are trained. B starts at zero, so that an adapted model first says what the pretrained one says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from notellm2_ray.core.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def language_linears(network: PreTrainedModel) -> list[str]:
    """Full paths of the language model's linear layers, without the head and the vision tower.

    Full paths, because the last part of a name is not unique: vision towers have a ``q_proj`` too.

    Raises:
        ModelError: there is no such layer.
    """
    decoder = network.get_decoder()
    # BLIP-2 calls its whole language model the decoder, with the head.
    inside = {id(module) for module in decoder.modules()} - {id(network.get_output_embeddings())}
    names = [n for n, module in network.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]
    if not names:
        raise ModelError(f"{type(network).__name__} has no linear layer in its language model that LoRA could adapt")
    return names


def add_lora(
    network: PreTrainedModel, *, rank: int, alpha: float, dropout: float, seed: int, task: str | None = None
) -> PeftModel:
    """Put LoRA matrices on a network's :func:`language_linears`, in place, and freeze everything else.

    The matrices are float32 whatever the network's type is. Their initial values depend only on ``seed``.

    Args:
        task: of peft, for an adapter that is saved as such: ``CAUSAL_LM``.

    Returns:
        peft's wrapper of ``network``, which can merge the matrices into the weights.

    Raises:
        ModelError: the network has no layer to adapt.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=language_linears(network),
        task_type=task,  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(network, config)
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # Autocast casts as needed; by default peft would first copy every input to float32.
        layer.cast_input_dtype_enabled = False
    adapted.train(network.training)  # new modules are in training mode, with dropout
    return adapted


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA matrix."""
    return ".lora_A." in name or ".lora_B." in name


def store_frozen_linears_in_bf16(network: nn.Module) -> None:
    """Store the frozen weights of linear layers in bfloat16: half the memory, for networks that autocast runs.

    Autocast would cast the same weights in every forward pass, so that the products are the same. Embeddings and norms
    stay as they are: what they give is added up in float32.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
