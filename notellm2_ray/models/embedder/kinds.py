"""The table of kinds of embedders. A kind is one file that ends in an :class:`EmbedderKind`, and one row here.

A kind has a network and a preprocessor. Training, the self-describing directory, bulk embedding, the index and the
service are shared by all kinds; they rely only on the protocols below. Another package adds a kind through the
entry-point group ``notellm2_ray.embedders``, which all processes of Ray see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.registry import Registry
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.model import ModelSettings

if TYPE_CHECKING:
    import torch

    from notellm2_ray.models.embedder.vectors import NoteVectors

Inputs = Literal["multimodal", "image", "text"]


class Features(Protocol):
    """One preprocessed note. Picklable."""

    @property
    def note_id(self) -> str: ...

    @property
    def num_tokens(self) -> int:
        """The length of the note in a batch; notes of similar length are batched together."""
        ...


class FeatureBatch(Protocol):
    """Features of several notes as tensors."""

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The same batch on ``device``."""
        ...


class Preprocessor(Protocol):
    """Makes features of notes and batches of features, without weights. Picklable; each thread uses its own copy."""

    settings: ModelSettings

    def features(self, note: Note, inputs: Inputs = "multimodal") -> Any:
        """One note's :class:`Features`; DataError if its image cannot be decoded."""
        ...

    def collate(self, features: Sequence[Any]) -> Any:
        """A :class:`FeatureBatch` of features, in the same order."""
        ...


class Network(Protocol):
    """A ``torch.nn.Module`` that computes the vectors of a batch.

    Attributes:
        temperature: float32 parameter of shape (1,); its exponential multiplies the cosine in the loss.
        width: length of the vectors without projection; asked for only where ``model.embedding_dim`` is null.
    """

    temperature: torch.nn.Parameter
    width: int

    def __call__(self, batch: Any) -> NoteVectors:
        """Named vectors of a batch. In training all parameters must take part, even if no note has an image, say."""
        ...

    def to_precision(self, precision: str) -> Any:
        """Convert the weights to float32 (``fp32``) or bfloat16 (``bf16``); the temperature stays float32."""
        ...

    def is_fresh(self, name: str) -> bool:
        """Whether the named parameter is randomly initialised, not pretrained."""
        ...

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, if the network supports it."""
        ...


@dataclass(frozen=True)
class EmbedderKind:
    """A kind of embedder.

    Attributes:
        build: (settings, seed, llm_path, vision_path, precision) -> network with pretrained and random weights, and
            preprocessor. Equal seeds give equal random weights.
        config: network -> further entries for the directory's config.json.
        describe: (network, preprocessor, directory) -> None; writes the tokenizer and the like into the directory.
        load: (settings, config.json's values, directory, attention implementation or None) -> network and preprocessor;
            the caller then loads the weights into the network.
        parts: settings -> the pretrained models that it is built from, of ``llm`` and ``vision``.
        natural_inputs: settings -> the parts of a note that it is made for.
        packaged_llm: which packaged model ``model.llm=packaged`` is.
        adapted: settings -> the name of the network's module that LoRA adapts, a Hugging Face model; None: it has none.
    """

    build: Callable[[ModelSettings, int, str, str, str], tuple[Any, Any]]
    config: Callable[[Any], Mapping[str, Any]]
    describe: Callable[[Any, Any, Path], None]
    load: Callable[[ModelSettings, Mapping[str, Any], Path, str | None], tuple[Any, Any]]
    parts: Callable[[ModelSettings], tuple[str, ...]]
    natural_inputs: Callable[[ModelSettings], Inputs]
    packaged_llm: Literal["llm", "mllm"] = "llm"
    adapted: Callable[[ModelSettings], str | None] = lambda settings: None


EMBEDDERS: Registry[EmbedderKind] = Registry(
    "kind of embedder",
    "notellm2_ray.embedders",
    {
        "notellm2": "notellm2_ray.models.embedder.notellm2:KIND",
        "mllm": "notellm2_ray.models.embedder.mllm:KIND",
    },
)


def kind_of(settings: ModelSettings) -> EmbedderKind:
    """The row that ``model.kind`` names.

    Raises:
        ConfigError: there is no such kind.
    """
    return EMBEDDERS.get(settings.kind)


def adapted_module(settings: ModelSettings) -> str:
    """Name of the network's module that LoRA adapts.

    Raises:
        ConfigError: the embedder has no LLM that LoRA could adapt.
    """
    name = kind_of(settings).adapted(settings)
    if name is None:
        raise ConfigError(
            f"train.lora adapts an LLM, and the embedder of model.kind={settings.kind}, "
            f"model.variant={settings.variant} trains none: set train.lora=null for it"
        )
    return name
