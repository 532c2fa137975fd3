"""The language model LLM_mu: any Hugging Face causal LM without its head, and its tokenizer with two added tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from notellm2_ray.core.errors import ModelError, first_line
from notellm2_ray.models.quiet import quiet_loading

IMAGE_TOKEN = "<IMG>"
VISUAL_MARK_TOKEN = "<IMG_EMB>"
_NEEDED = (
    "model.llm needs the directory or hub name of a causal language model in Hugging Face format "
    "(config.json, *.safetensors, tokenizer), such as a Llama, Qwen2, Qwen3, Mistral, Gemma 3 or Phi"
)


def read_config(path: str, revision: str | None, needed: str) -> PretrainedConfig:
    """Configuration of the model at ``path`` (a directory or a hub name), of any kind.

    Raises:
        ModelError: there is none; the message ends in ``needed``.
    """
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a model: {first_line(error)}. {needed}") from error


@quiet_loading()
def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Configuration of the causal LM at ``path`` (a directory or a hub name); of a multimodal LLM, that of its LM.

    Raises:
        ModelError: the model does not exist or is not a causal LM.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ModelError(f"{path} is not a model directory: it has no config.json. {_NEEDED}")
    config = read_config(path, revision, _NEEDED)
    kind = f"{path} is a {config.model_type or 'model of unknown type'}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}, an encoder-decoder. {_NEEDED}")
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    language = config.get_text_config(decoder=True) if generates else config
    if not generates or not hasattr(language, "hidden_size"):
        raise ModelError(f"{kind}, not a causal language model. {_NEEDED}")
    # Bidirectional attention would let the visual vector see the text.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(f"{kind}, a masked language model. {_NEEDED}")
    if getattr(language, "use_bidirectional_attention", None) in (True, "all"):
        raise ModelError(f"{kind} with attention in both directions. {_NEEDED}")
    return language


@quiet_loading()
def load_llm(
    path: str, attention: str, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> PreTrainedModel:
    """The pretrained LM without its head; it returns the states after the final norm.

    Raises:
        ModelError: as in :func:`load_config`, or the weights are missing or not safetensors.
    """
    language = load_config(path, revision)
    try:
        llm, report = AutoModel.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"the weights of {path} cannot be loaded: {first_line(error)}. Only safetensors are read; save a "
            "model that has pickled weights again with save_pretrained"
        ) from error
    require_all_weights(report, path)
    return llm if type(llm.config) is type(language) else _language_half(llm, language, path)


def _language_half(model: PreTrainedModel, config: PretrainedConfig, path: str) -> PreTrainedModel:
    """The LM inside a multimodal LLM, without its head."""
    found = model.get_decoder().base_model
    if type(found.config) is not type(config):
        raise ModelError(f"the language model inside {path}, a {model.config.model_type}, was not found. {_NEEDED}")
    return found


def attend_eagerly(network: Any) -> None:
    """Replace PyTorch's fused attention for training on a CPU: there its backward pass is slow.

    Forward passes take the same time with prompts as short as a note's. The saved configuration does not change.
    """
    if isinstance(network, PreTrainedModel) and network.config._attn_implementation == "sdpa":
        network.set_attn_implementation("eager")


def llm_from_config(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The LM with randomly initialised weights; on the meta device without any."""
    return AutoModel.from_config(config, attn_implementation=attention)


def require_all_weights(report: dict[str, Any], path: str) -> None:
    """Raise :class:`ModelError` if a loading report names weights that the checkpoint lacks."""
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if wrong:
        raise ModelError(
            f"the checkpoint {path} lacks {len(wrong)} of its model's weights ({', '.join(wrong[:3])}, ...): it is "
            "incomplete or of another architecture"
        )


@quiet_loading()
def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The LM's tokenizer with :data:`IMAGE_TOKEN` and :data:`VISUAL_MARK_TOKEN` added.

    Raises:
        ModelError: there is no usable tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path} has no usable tokenizer: {first_line(error)}. {_NEEDED}") from error
    refuse_mistral_common(tokenizer, path)
    added = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, VISUAL_MARK_TOKEN)]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def refuse_mistral_common(tokenizer: Any, path: str) -> None:
    """Raise :class:`ModelError` for Mistral's own tokenizer, which takes no added tokens and shows no chat template."""
    if type(tokenizer).__name__ == "MistralCommonBackend":
        raise ModelError(
            f"{path} has Mistral's own tokenizer (tekken.json), which neither takes added tokens nor shows its chat "
            "template. If there is a tokenizer.json too, move tekken.json out of the directory; otherwise take the "
            "model in Hugging Face layout"
        )


def embed_added_tokens(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the embeddings of the two added tokens to the mean of all others, and enlarge the table if needed.

    Rows beyond the tokenizer's last token only pad the vocabulary and are left out of the mean.
    """
    added: Any = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VISUAL_MARK_TOKEN])
    end = max(len(tokenizer), *(number + 1 for number in added))  # a vocabulary may have gaps
    if end > len(_embedding_table(llm)):
        llm.resize_token_embeddings(end, mean_resizing=False)
    table = _embedding_table(llm)
    others = torch.ones(len(table), dtype=torch.bool)
    others[end:] = False
    others[added] = False
    with torch.no_grad():
        table[added] = table[others].float().mean(dim=0).to(table.dtype)


def _embedding_table(llm: PreTrainedModel) -> torch.Tensor:
    table = llm.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    return table
