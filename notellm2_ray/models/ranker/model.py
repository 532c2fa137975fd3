"""The ranker: any Hugging Face image-text model (or text-only LLM) that answers yes or no, with LoRA on its LLM."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.ranking import TuneSettings
from notellm2_ray.models.chat import load_processor
from notellm2_ray.models.llm import read_config, require_all_weights
from notellm2_ray.models.lora import add_lora
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.ranker.inputs import IGNORED, RankerBatch

log = logging.getLogger("notellm2_ray")

_NEEDED = "ranker.model must be a Hugging Face image-text model, or for ranker.variant=tallrec a text-only LLM"


@quiet_loading()
def load_network(path: str, dtype: torch.dtype | str = "auto", revision: str | None = None) -> PreTrainedModel:
    """The pretrained network in a directory or under a hub name: an image-text model if it is one, otherwise an LLM.

    Args:
        dtype: of the weights; ``auto``: the checkpoint's own.

    Raises:
        ModelError: there is no model, it is of another kind, or its weights are incomplete or not safetensors.
    """
    config = read_config(path, revision, _NEEDED)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind: Any = AutoModelForImageTextToText
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = AutoModelForCausalLM
    else:
        raise ModelError(f"{path} is a {config.model_type or 'model of unknown type'}. {_NEEDED}")
    try:
        network, report = kind.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"the weights of {path} cannot be loaded: {first_line(error)}. They must be safetensors"
        ) from error
    require_all_weights(report, path)
    _repair_generation(network, path)
    return network


def _repair_generation(network: PreTrainedModel, path: str) -> None:
    """Make the generation settings valid, which transformers demands before it writes a model: before training.

    Vicuna's, and so LLaVA's, name a temperature without sampling.
    """
    settings = network.generation_config
    try:
        if settings is not None:
            settings.validate(strict=True)
        return
    except ValueError:
        settings.do_sample = True
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"{path}: its generation_config.json is invalid, so that a tuned model could not be written: "
            f"{first_line(error)}. Correct the file, or remove it"
        ) from error
    log.warning("%s: generation_config.json is valid only with do_sample=true, which a tuned model gets", path)


class RankerModel(nn.Module):
    """The network with LoRA matrices on its language model's linear layers; everything else is frozen."""

    def __init__(self, network: PreTrainedModel, tune: TuneSettings) -> None:
        """Add LoRA.

        The matrices are float32 whatever the network's type is. Their initial values depend only on ``tune.seed``.
        """
        super().__init__()
        network.config.use_cache = False
        self.peft = add_lora(
            network,
            rank=tune.lora_rank,
            alpha=tune.lora_alpha,
            dropout=tune.lora_dropout,
            seed=stream_seed(tune.seed, "ranker", "lora"),
            task="CAUSAL_LM",
        )
        self.set_gradient_checkpointing(tune.gradient_checkpointing)

    def forward(self, batch: RankerBatch, places: torch.Tensor) -> torch.Tensor:
        """Logits (N, P, V) at the P ``places`` (P,) of every row."""
        return forward_logits(self.peft.get_base_model(), batch, places)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass: less memory, about a third slower."""
        network: Any = self.peft.get_base_model()
        if enabled:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # For reentrant checkpoints the library lets the outputs of embeddings require gradients. These are not
            # reentrant, and the frozen vision tower would get a backward pass.
            network.disable_input_require_grads()
        else:
            network.gradient_checkpointing_disable()

    def is_fresh(self, name: str) -> bool:
        """Never: all LoRA matrices learn at the same rate."""
        return False

    def save_adapter(self, directory: Path, weights: dict[str, torch.Tensor], base: str) -> None:
        """Write ``weights`` (by this module's parameter names) as a peft adapter of the model ``base``."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        config = self.peft.peft_config["default"]
        config.base_model_name_or_path = base
        state = {name.removeprefix("peft."): tensor for name, tensor in weights.items()}
        directory.mkdir(parents=True, exist_ok=True)
        adapter = get_peft_model_state_dict(self.peft, state_dict=state, save_embedding_layers=False)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, _adapter_file(directory))
        inference_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(directory))
        config.inference_mode = inference_mode


def forward_logits(network: Any, batch: RankerBatch, places: torch.Tensor) -> torch.Tensor:
    """Logits (N, P, V) of a Hugging Face model at the ``places`` (P,) of every row."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    known = inspect.signature(network.forward).parameters
    # Gemma 3's tokens of one image attend to each other both ways. PaliGemma's types mark the answer instead.
    if batch.vision and network.config.model_type != "paligemma":
        inputs |= dict.fromkeys({"mm_token_type_ids", "token_type_ids"} & set(known), batch.is_image)
    if "logits_to_keep" in known:
        return network(**inputs, logits_to_keep=places).logits
    return network(**inputs).logits[:, places]


def answer_loss(model: RankerModel, batch: RankerBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the labelled tokens.

    Returns:
        Its sum in nats (float32), and for each row whether it is finite (N,).
    """
    wanted = batch.labels[:, 1:] != IGNORED  # a token is predicted at the place before it
    places = wanted.any(dim=0).nonzero().squeeze(-1)
    logits = model(batch, places).float()
    labels = batch.labels[:, places + 1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    losses = losses.view_as(labels)
    return losses.sum(), torch.isfinite(losses.detach()).all(dim=1)


def yes_probability(logits: torch.Tensor, yes_id: int, no_id: int) -> torch.Tensor:
    """P(yes) / (P(yes) + P(no)) from logits (..., V), computed in float32: (...)."""
    pair = logits[..., [yes_id, no_id]].float()
    return pair.softmax(dim=-1)[..., 0]


def answer_probability(model: Any, batch: RankerBatch, yes_id: int, no_id: int) -> torch.Tensor:
    """P(yes) of every row: (N,) float32. ``model`` takes (batch, places) and returns logits (N, P, V)."""
    places, row_place = batch.last.unique(return_inverse=True)
    logits = model(batch, places)
    return yes_probability(logits[torch.arange(len(row_place)), row_place], yes_id, no_id)


@quiet_loading()
def merge_adapter(base: str, adapter: Path, directory: Path) -> None:
    """Write the base model with an adapter merged into its weights, as a complete model.

    The weights keep the checkpoint's own type.
    """
    from peft import PeftModel

    network = load_network(base)
    merged = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.save_pretrained(str(directory))
    load_processor(base).save_pretrained(str(directory))


def _adapter_file(directory: Path) -> Path:
    return directory / "adapter_model.safetensors"
