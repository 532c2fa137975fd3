"""The network of a multimodal LLM as embedder: the model without its head, the last token's state, a projection."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.mllm_inputs import MllmBatch
from notellm2_ray.models.embedder.vectors import NOTE, NoteVectors, projection
from notellm2_ray.models.llm import read_config, require_all_weights
from notellm2_ray.models.quiet import quiet_loading

_NEEDED = (
    "model.kind=mllm needs the directory or hub name of an image-text model in Hugging Face format, such as a Qwen-VL, "
    "LLaVA or BLIP-2"
)


class MllmModel(nn.Module):
    """The embedder's network.

    Args:
        settings: of the embedder.
        network: of :func:`load_network` or :func:`network_from_config`.

    Attributes:
        temperature: tau of Eq. 1, float32 of shape (1,); its exponential multiplies the cosine.
        width: of the language model's states.
    """

    def __init__(self, settings: ModelSettings, network: PreTrainedModel) -> None:
        super().__init__()
        self.mllm: Any = network
        self.width: int = network.config.get_text_config().hidden_size
        self.projection = projection(self.width, settings)
        self.temperature = nn.Parameter(torch.full((1,), settings.start_temperature, dtype=torch.float32))
        self._known = set(inspect.signature(network.forward).parameters)
        self._frozen_tower = settings.freeze_vision is not False
        if self._frozen_tower:
            freeze_tower(network)

    def forward(self, batch: MllmBatch) -> NoteVectors:
        """Vectors of a batch's notes. In training every parameter takes part, even if no note has an image.

        Otherwise ranks with images would wait for ever for ranks without. With sharded weights that includes the frozen
        tower's.
        """
        notes = len(batch.last)
        dummy = self.training and not batch.vision
        if dummy:
            batch = batch.with_blank()
        states = self._states(batch)[torch.arange(len(batch.last), device=batch.last.device), batch.last]
        if dummy:
            states = states[:notes] + 0.0 * states[notes:].sum()
        vectors = self.projection(states).float()
        return NoteVectors({NOTE: vectors}, {}, self.temperature.float().squeeze().clone())

    def _states(self, batch: MllmBatch) -> torch.Tensor:
        """States (N, T, h) after the final norm."""
        if not batch.vision:
            ids, mask = batch.rows["input_ids"], batch.rows["attention_mask"]
            return self.mllm.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        dtype = self.mllm.get_input_embeddings().weight.dtype
        vision = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.vision.items()}
        inputs = {name: values for name, values in {**batch.rows, **vision}.items() if name in self._known}
        out = self.mllm(**inputs, use_cache=False)
        # What BLIP-2's class calls logits is what its language model returns, which has no head here.
        return out.last_hidden_state if "last_hidden_state" in out else out.logits

    def to_precision(self, precision: str) -> MllmModel:
        """Convert the weights to float32 (``fp32``) or bfloat16 (``bf16``); the temperature stays float32."""
        # Parameters only. The angles of rotary positions are buffers, and bfloat16 is too coarse for them.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.temperature.data = self.temperature.data.float()
        return self

    def is_fresh(self, name: str) -> bool:
        """Whether the named parameter is randomly initialised, not pretrained."""
        return name.startswith("projection.")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass: less memory, about a third slower."""
        # A frozen tower keeps no activations.
        trained = self.mllm.get_decoder() if self._frozen_tower else self.mllm
        if enabled:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            trained.gradient_checkpointing_disable()


@quiet_loading()
def load_network(path: str, attention: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """The pretrained multimodal LLM in a directory or under a hub name, without its head.

    Raises:
        ModelError: there is no model, it is of another kind, or its weights are incomplete or not safetensors.
    """
    config = read_config(path, revision, _NEEDED)
    kind = f"{path} is a {config.model_type or 'model of unknown type'}"
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"{kind}, not an image-text model. {_NEEDED}")
    if config.is_encoder_decoder or config.get_text_config(decoder=True).is_encoder_decoder:
        raise ModelError(
            f"{kind} with an encoder-decoder as language model: its last token is not a summary. {_NEEDED}"
        )
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"the weights of {path} cannot be loaded: {first_line(error)}. Only safetensors are read"
        ) from error
    whole, report = loaded
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    network = _without_head(whole)
    # Checkpoints of embedders often have no head.
    kept = {names[id(parameter)] for parameter in network.parameters()}
    require_all_weights({**report, "missing_keys": kept.intersection(report["missing_keys"])}, path)
    return network


def network_from_config(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """As :func:`load_network`, with random weights."""
    return _without_head(AutoModelForImageTextToText.from_config(config, attn_implementation=attention))


def _without_head(whole: Any) -> PreTrainedModel:
    if whole.base_model is not whole:
        return whole.base_model
    decoder = whole.get_decoder()
    if decoder is whole:
        raise ModelError(f"{type(whole).__name__} has no language model beside its image encoder. {_NEEDED}")
    whole.set_decoder(decoder.base_model)  # BLIP-2 holds a whole causal LM, with its head
    return whole


def freeze_tower(network: PreTrainedModel) -> None:
    """Freeze the image encoder. Its connector to the language model is still trained, as in the paper's rows.

    Qwen-VL has its connector inside the encoder, as a ``merger``.
    """
    for name, parameter in network.get_encoder(modality="image").named_parameters():
        parameter.requires_grad_("merger" in name)
