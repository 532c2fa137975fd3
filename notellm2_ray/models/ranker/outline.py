"""The ranker without weights, for a forecast of its memory (:mod:`notellm2_ray.models.footprint`)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from notellm2_ray.core.settings.ranking import TuneSettings
from notellm2_ray.models.footprint import Outline
from notellm2_ray.models.llm import read_config
from notellm2_ray.models.ranker.model import RankerModel

TOKENS = 256  # of a sample


def ranker_outline(path: str, tune: TuneSettings, *, bf16: bool) -> tuple[Outline, int]:
    """The network as it is tuned, whose samples are prompts of :data:`TOKENS` tokens; and the size of its vocabulary.

    Raises:
        ModelError: the configuration cannot be read.
    """
    config = read_config(path, None, "ranker.model must be a Hugging Face model")
    text = config.get_text_config(decoder=True)
    images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM

    def build() -> Any:
        network = kind.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32)
        return RankerModel(network, tune).train()

    def run(model: Any, count: int) -> Any:
        # The image encoder is left out: frozen, it keeps nothing for the backward pass.
        states = torch.zeros(count, TOKENS, text.hidden_size, dtype=torch.bfloat16 if bf16 else torch.float32)
        decoder = model.peft.get_base_model().get_decoder()
        return decoder(inputs_embeds=states, use_cache=False)[0]

    return Outline(build, run, text.num_hidden_layers), text.vocab_size
