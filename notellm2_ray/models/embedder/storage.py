"""The files of an embedder's directory: a configuration that names the kind of embedder, and safetensors weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.kinds import EMBEDDERS

FORMAT = 1
CONFIG_FILE = "config.json"
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"

# What sentence-transformers reads: our class is the only module, and its files are in the directory itself. Vectors are
# compared by cosine, and the embedder has its prompt in itself.
_SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "notellm2_ray.models.sentence_transformer.NoteTransformer"}
    ],
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def local_directory(name: str | Path) -> Path:
    """``name`` as a path; a name such as ``me/notes`` that is no path here is downloaded from the Hugging Face hub.

    Raises:
        ModelError: there is neither, or the hub cannot be reached.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"there is no directory {name}, and the hub gives no such repository: {error}") from error


def read_config(path: str | Path) -> tuple[ModelSettings, dict[str, Any]]:
    """The settings of the embedder in a directory, and all values of its config.json.

    Raises:
        ModelError: the directory holds no embedder, or one of another format.
    """
    directory = Path(path)
    try:
        values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{directory} holds no embedder: {CONFIG_FILE} is missing. Give the directory that train-embedder "
            "wrote its model to"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / CONFIG_FILE} cannot be read: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in EMBEDDERS.names():
        raise ModelError(
            f"{directory} holds a model of kind {kind!r}, not an embedder of this package "
            f"({', '.join(map(repr, EMBEDDERS.names()))}); "
            "such a model can be model.llm or model.vision of a new embedder"
        )
    if values.get("format") != FORMAT:
        raise ModelError(f"{directory} has format {values.get('format')!r}; this version reads format {FORMAT}")
    try:
        return build(ModelSettings, values["settings"]), values
    except (ConfigError, KeyError) as error:
        raise ModelError(f"{directory / CONFIG_FILE} does not describe an embedder: {error}") from error


def describe_to_sentence_transformers(directory: Path) -> None:
    """Write the files with which ``SentenceTransformer(directory)`` finds the embedder; our own loader ignores them."""
    for name, values in _SENTENCE_TRANSFORMERS.items():
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_weights(state: Mapping[str, torch.Tensor], directory: Path, max_shard_size: str = "5GB") -> None:
    """Write weights as safetensors; large ones in several files with an index."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(state), directory, max_shard_size=max_shard_size)


def without_values(model: Any) -> Any:
    """The same network, whose parameters have shape and type alone until weights are loaded. Buffers stay."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a shared parameter stays shared
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                module._parameters[name] = made.setdefault(parameter, empty)
    return model


def load_weights(model: nn.Module, directory: Path, device: str) -> None:
    """Load the weights of a directory into ``model``, on ``device``. Names and shapes must match exactly.

    Parameters get the type that those of ``model`` have, before they are moved: a card never holds them in another one.

    Raises:
        ModelError: a file is missing or damaged, or the weights do not match the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    types = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    state: dict[str, torch.Tensor] = {}
    for name in _weight_files(directory):
        try:
            for key, tensor in load_file(directory / name).items():
                state[key] = tensor.to(types.get(key, tensor.dtype)).to(device)
        except FileNotFoundError:
            raise ModelError(f"{directory} is incomplete: {name} is missing") from None
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory / name} is damaged: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"the weights in {directory} do not fit its {CONFIG_FILE}: {len(wrong)} differ, first {first} "
            f"(expected {expected.get(first, 'none')}, found {found.get(first, 'none')})"
        )
    model.load_state_dict(state, assign=True)


def _weight_files(directory: Path) -> list[str]:
    index = directory / _INDEX_FILE
    if not index.is_file():
        return [_SINGLE_FILE]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ModelError(f"{index} is damaged: {error}") from error
