"""The embedder's interface: it turns notes into unit vectors, and is saved in a self-describing directory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.initialization import no_init_weights

from notellm2_ray.core.config import shaping
from notellm2_ray.core.devices import batch_notes
from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.device import allow_tf32, inference_precision
from notellm2_ray.models.embedder.kinds import Features, Inputs, Preprocessor, kind_of
from notellm2_ray.models.embedder.storage import (
    CONFIG_FILE,
    FORMAT,
    describe_to_sentence_transformers,
    load_weights,
    local_directory,
    read_config,
    save_weights,
    without_values,
)

_LOADING = threading.Lock()
_QUEUED_BATCHES = 8  # on a GPU, before the vectors of the oldest batch are fetched


class NoteEncoder:
    """A trained embedder.

    Attributes:
        model: the network (:class:`~notellm2_ray.models.embedder.kinds.Network`).
        preprocessor: makes features and batches of notes (:class:`~notellm2_ray.models.embedder.kinds.Preprocessor`).
        trained_dimensions: the lengths of vectors that it was trained for (``train.dimensions``); empty: whole alone.
        dimensions: the length to which all of its vectors are cut; None: they are whole.
    """

    def __init__(self, model: Any, preprocessor: Any, trained_dimensions: Sequence[int] = ()) -> None:
        self.model = model
        self.preprocessor = preprocessor
        self.trained_dimensions = tuple(trained_dimensions)
        self.dimensions: int | None = None
        self._one_pass = threading.Lock()

    @property
    def settings(self) -> ModelSettings:
        return self.preprocessor.settings

    @property
    def embedding_dim(self) -> int:
        """D, the length of a note's vector."""
        whole = self.settings.embedding_dim
        return self.dimensions or (int(self.model.width) if whole is None else whole)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that a vector can have, D first."""
        shorter = sorted((one for one in self.trained_dimensions if one < self.embedding_dim), reverse=True)
        return (self.embedding_dim, *shorter)

    def checked(self, dimensions: int | None) -> int:
        """The length of vectors if ``dimensions`` are asked for; None: D.

        Raises:
            ConfigError: it was not trained for that length.
        """
        if dimensions in (None, *self.lengths):
            return dimensions or self.embedding_dim
        raise ConfigError(
            f"the embedder has no vectors of {dimensions} numbers: ask for {' or '.join(map(str, self.lengths))}, or "
            "train further lengths with train.dimensions"
        )

    @property
    def device(self) -> torch.device:
        return self.model.temperature.device

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights (16 hex digits). Reads all weights: seconds for a large model."""
        digest = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        if self.dimensions is not None:
            digest.update(f"cut to {self.dimensions}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()[:16]

    def encode(
        self,
        notes: Sequence[Note],
        inputs: Inputs = "multimodal",
        *,
        dimensions: int | None = None,
        batch_tokens: int = 16_384,
        max_batch_notes: int | None = None,
    ) -> np.ndarray:
        """Vectors of notes, in the same order. Leaves the model in evaluation mode.

        Args:
            inputs: the parts of each note that the model gets (Table 3).
            dimensions: D, one of :attr:`lengths`; None: the first.
            batch_tokens: most padded tokens in a forward pass; notes of similar length go together.
            max_batch_notes: most notes in a forward pass; None: 256 on a GPU, 32 on a CPU.

        Returns:
            (N, D) float32, each row of length one.

        Raises:
            ConfigError: the embedder was not trained for vectors of that length.
            DataError: an image cannot be decoded, or a vector is not finite; the message names the notes.
        """
        self.checked(dimensions)
        features = [self.preprocessor.features(note, inputs) for note in notes]
        vectors = self.encode_features(
            features, dimensions=dimensions, batch_tokens=batch_tokens, max_batch_notes=max_batch_notes
        )
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            names = ", ".join(features[row].note_id for row in wrong[:5])
            raise DataError(
                f"the model gave vectors that are not finite for {len(wrong)} of {len(features)} notes ({names}): "
                "its weights are damaged, or its activations overflow in this precision (try precision=fp32)"
            )
        return vectors

    def encode_features(
        self,
        features: Sequence[Features],
        *,
        dimensions: int | None = None,
        batch_tokens: int = 16_384,
        max_batch_notes: int | None = None,
    ) -> np.ndarray:
        """As :meth:`encode`, for features of notes.

        Returns:
            (N, D) float32. Rows can be non-finite; the caller must check.
        """
        length = self.checked(dimensions)
        vectors = np.empty((len(features), length), np.float32)
        if self.model.training:  # eval() visits every module, which takes as long as a tiny model's forward pass
            self.model.eval()
        most = batch_notes(max_batch_notes, self.device.type)
        queued: deque[tuple[np.ndarray, Any]] = deque()  # rows, and their vectors on the device
        for rows in batches_by_length([item.num_tokens for item in features], batch_tokens, most):
            queued.append((rows, self.launch([features[row] for row in rows], length)))
            # Fetching waits for the GPU. Queued batches keep it busy while the next one is prepared.
            if len(queued) > (_QUEUED_BATCHES if self.device.type == "cuda" else 0):
                done, unit = queued.popleft()
                vectors[done] = self.fetch(unit)
        for done, unit in queued:
            vectors[done] = self.fetch(unit)
        return vectors

    def launch(self, features: Sequence[Features], length: int) -> Any:
        """Start one forward pass; on a GPU it need not be over at the return.

        Threads may call it at the same time. One prepares its batch while another launches, and never two launch at
        once: their activations together would take twice the memory.

        Returns:
            what :meth:`fetch` takes.
        """
        batch = self.preprocessor.collate(features)
        on_gpu = self.device.type == "cuda"
        batch = batch.pin_memory() if on_gpu else batch
        with self._one_pass, torch.inference_mode():
            batch = batch.to(self.device, non_blocking=on_gpu)
            return F.normalize(self.model(batch).multimodal[:, :length], dim=-1)

    def fetch(self, launched: Any) -> np.ndarray:
        """Wait for a forward pass; its vectors, (N, length) float32."""
        return launched.cpu().numpy()

    def save_pretrained(self, path: str | Path) -> None:
        """Write the self-describing directory: config.json, model*.safetensors, tokenizer, preprocessor_config.json.

        ``SentenceTransformer(path, trust_remote_code=True)`` loads it too, by its modules.json.
        """
        self.save_description(path)
        save_weights(self.model.state_dict(), Path(path))

    def save_description(self, path: str | Path) -> None:
        """Write everything except the weights, for a caller that writes those itself."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        kind_of(self.settings).describe(self.model, self.preprocessor, directory)
        (directory / CONFIG_FILE).write_text(
            json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        describe_to_sentence_transformers(directory)

    def _config(self) -> dict[str, Any]:
        return {
            "model_type": self.settings.kind,
            "architectures": [type(self.model).__name__],
            "format": FORMAT,
            "settings": shaping(self.settings),
            **({"dimensions": list(self.trained_dimensions)} if self.trained_dimensions else {}),
            **kind_of(self.settings).config(self.model),
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "cpu",
        precision: str = "auto",
        attention: str | None = None,
        dimensions: int | None = None,
    ) -> NoteEncoder:
        """Read a directory written by :meth:`save_pretrained`.

        Args:
            path: the directory, or the repository on the Hugging Face hub that it was uploaded to.
            precision: ``bf16``, ``fp32``, or ``tf32`` (float32 weights, whose products a GPU may round); ``auto``: bf16
                on a GPU that multiplies it natively, else fp32. The temperature stays float32.
            attention: implementation; default: as in training, except flash attention, which does not run on a CPU.
            dimensions: length to which all vectors are cut, one that it was trained for; None: they are whole.

        Raises:
            ConfigError: it was not trained for vectors of that length.
            ModelError: the directory is missing or incomplete, or holds another kind of model.
        """
        directory = local_directory(path)
        settings, values = read_config(directory)
        trained_with = settings.attention
        attention = attention or ("sdpa" if trained_with == "flash_attention_2" and device == "cpu" else trained_with)
        model, preprocessor = _unfilled(settings, values, directory, attention)
        precision = inference_precision(precision, device)
        allow_tf32(precision, device)
        without_values(model).to_precision(precision)
        load_weights(model, directory, device)
        model = model.to(device).eval()
        encoder = cls(model, preprocessor, values.get("dimensions", ()))
        encoder.dimensions = None if dimensions is None else encoder.checked(dimensions)
        return encoder


def load_preprocessor(path: str | Path) -> Preprocessor:
    """The preprocessor of a directory written by :meth:`NoteEncoder.save_pretrained`; no weights are read.

    Raises:
        ModelError: the directory is missing or incomplete, or holds another kind of model.
    """
    directory = local_directory(path)
    settings, values = read_config(directory)
    return _unfilled(settings, values, directory, "eager")[1]


def _unfilled(
    settings: ModelSettings, values: Mapping[str, Any], directory: Path, attention: str
) -> tuple[Any, Preprocessor]:
    # transformers replaces torch's initialisers in the whole process, and threads would restore each other's.
    with _LOADING, no_init_weights():
        return kind_of(settings).load(settings, values, directory, attention)


def batches_by_length(lengths: Sequence[int], batch_tokens: int, max_notes: int) -> Iterator[np.ndarray]:
    """Row numbers of batches, longest notes first, so that there is little padding.

    A batch's number of notes times its longest length is at most ``batch_tokens``; a longer note gets its own batch.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    begin = 0
    while begin < len(order):
        num = min(max_notes, max(1, batch_tokens // max(1, lengths[order[begin]])))
        yield order[begin : begin + num]
        begin += num
