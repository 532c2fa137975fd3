"""The table of embedders that can be trained: a kind is one file that ends in an :class:`EmbedderKind`, and a row here.

A kind brings a network and a preprocessor. Everything else is shared: training, the self-describing directory, bulk
embedding, the index and the service ask for no more than the protocols below. Another package adds a kind through the
entry-point group ``notellm2_ray.embedders``, which every process sees that Ray starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from notellm2_ray.core.registry import Registry
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.model import ModelSettings

if TYPE_CHECKING:
    import torch

    from notellm2_ray.models.embedder.vectors import NoteVectors

Inputs = Literal["multimodal", "image", "text"]


class Features(Protocol):
    """One note, ready to be put into a batch. Picklable."""

    @property
    def note_id(self) -> str: ...

    @property
    def num_tokens(self) -> int:
        """What the note costs in a batch: notes of like cost go together."""
        ...


class FeatureBatch(Protocol):
    """Features of several notes as tensors."""

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The same batch on ``device``."""
        ...


class Preprocessor(Protocol):
    """Notes to features, features to batches, without weights. Picklable; a thread uses a copy of its own."""

    settings: ModelSettings

    def features(self, note: Note, inputs: Inputs = "multimodal") -> Any:
        """One note's :class:`Features`; DataError if its image cannot be decoded."""
        ...

    def collate(self, features: Sequence[Any]) -> Any:
        """A :class:`FeatureBatch` of features, in their order."""
        ...


class Network(Protocol):
    """A ``torch.nn.Module`` that makes vectors of batches.

    Attributes:
        temperature: float32 parameter of shape (1,); its exponential multiplies the cosine in the loss.
    """

    temperature: torch.nn.Parameter

    def __call__(self, batch: Any) -> NoteVectors:
        """Named vectors of a batch. In training every parameter takes part, whatever the notes hold."""
        ...

    def to_precision(self, precision: str) -> Any:
        """Weights in float32 (``fp32``) or bfloat16 (``bf16``); the temperature stays float32."""
        ...

    def is_fresh(self, name: str) -> bool:
        """Whether the parameter of that name starts random, as against pretrained."""
        ...

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, where the network can."""
        ...


@dataclass(frozen=True)
class EmbedderKind:
    """A kind of embedder.

    Attributes:
        build: (settings, seed, llm_path, vision_path, precision) -> network with pretrained and random weights, and
            preprocessor. Equal seeds give equal random weights.
        config: network -> further entries of the directory's config.json.
        describe: (network, preprocessor, directory) -> writes tokenizer and the like into the directory.
        load: (settings, config.json's values, directory, attention implementation or None) -> network whose weights
            are then read into it, and preprocessor.
        parts: settings -> which of ``llm`` and ``vision`` it is built from.
        natural_inputs: settings -> what of a note it is meant to be given.
    """

    build: Callable[[ModelSettings, int, str, str, str], tuple[Any, Any]]
    config: Callable[[Any], Mapping[str, Any]]
    describe: Callable[[Any, Any, Path], None]
    load: Callable[[ModelSettings, Mapping[str, Any], Path, str | None], tuple[Any, Any]]
    parts: Callable[[ModelSettings], tuple[str, ...]]
    natural_inputs: Callable[[ModelSettings], Inputs]


EMBEDDERS: Registry[EmbedderKind] = Registry(
    "kind of embedder", "notellm2_ray.embedders", {"notellm2": "notellm2_ray.models.embedder.notellm2:KIND"}
)


def kind_of(settings: ModelSettings) -> EmbedderKind:
    """The row that ``model.kind`` names.

    Raises:
        ConfigError: there is none.
    """
    return EMBEDDERS.get(settings.kind)
