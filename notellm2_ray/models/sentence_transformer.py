"""The embedder as a module of sentence-transformers, which its directory's modules.json names.

>>> from sentence_transformers import SentenceTransformer
>>> model = SentenceTransformer("runs/world/embedders/notellm2-seed42/model", trust_remote_code=True)
>>> model.encode(["red shoes", {"title": "Harbour", "image": "harbour.jpg"}])

sentence-transformers 6 asks for ``trust_remote_code=True`` for each class outside of its own package. No code is
downloaded: the class is the installed package's. Without the flag:

>>> SentenceTransformer(modules=[NoteTransformer.load("runs/world/embedders/notellm2-seed42/model")])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from sentence_transformers.base.modality_types import Modality
from sentence_transformers.base.modules import InputModule

from notellm2_ray.core.errors import ModelError
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.embedder.kinds import kind_of
from notellm2_ray.models.note_inputs import as_note

_MODALITIES: Mapping[str, list[Modality]] = {
    "multimodal": ["text", "image", ("image", "text"), "message"],  # a batch of both kinds is a "message" there
    "image": ["image"],
    "text": ["text"],
}


class NoteTransformer(InputModule):
    """Turns texts, images and notes (:func:`~notellm2_ray.models.note_inputs.as_note`) into unit vectors.

    The vectors are those of :meth:`~notellm2_ray.models.embedder.encoder.NoteEncoder.encode` up to rounding. It is made
    for encoding; training with the losses of sentence-transformers is not supported.

    Attributes:
        encoder: the embedder.
        model: its network, registered here so that the weights move with the module.
        tokenizer: the tokenizer of its texts; None if the kind of embedder has none.
    """

    def __init__(self, encoder: NoteEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model
        self.tokenizer = getattr(encoder.preprocessor, "tokenizer", None)

    @property
    def modalities(self) -> list[Modality]:
        """What the model takes; which of them depends on what it was built from."""
        return list(_MODALITIES[kind_of(self.encoder.settings).natural_inputs(self.encoder.settings)])

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of the longest prompt, if all have one bound; longer notes are cut as in training."""
        longest = getattr(self.encoder.preprocessor, "max_tokens", None)
        return longest if isinstance(longest, int) else None

    def get_embedding_dimension(self) -> int:
        """D, the length of a vector."""
        return self.encoder.embedding_dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """A batch of inputs.

        Args:
            prompt: text before the content of each note. The model has a prompt of its own around it.

        Raises:
            DataError: an input is no note, or its image cannot be decoded.
        """
        reads_text = "text" in self.modalities
        notes = [as_note(given, reads_text=reads_text) for given in inputs]
        if prompt:
            notes = [note._replace(content=prompt + note.content) for note in notes]
        preprocessor = self.encoder.preprocessor
        return {"notes": preprocessor.collate([preprocessor.features(note) for note in notes])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding``: (N, D) float32, each row of length one."""
        batch = features["notes"].to(self.encoder.device)
        vectors = self.model(batch).multimodal[:, : self.encoder.embedding_dim]
        return {**features, "sentence_embedding": F.normalize(vectors, dim=-1)}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the embedder's self-describing directory; the weights are always safetensors."""
        self.encoder.save_pretrained(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> NoteTransformer:
        """Load a directory, or a repository of the Hugging Face hub.

        Args:
            model_kwargs: ``dtype`` (or ``torch_dtype``), float32 or bfloat16, and ``attn_implementation``.

        Raises:
            ModelError: it holds no embedder, or an option is not supported.
        """
        directory = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        options = dict(model_kwargs or {})
        attention = options.pop("attn_implementation", None)
        precision = _precision([options.pop(name, None) for name in ("dtype", "torch_dtype")])
        if options:
            raise ModelError(f"model_kwargs may hold dtype and attn_implementation, not {', '.join(options)}")
        return cls(NoteEncoder.from_pretrained(directory or model_name_or_path, "cpu", precision, attention))

    def get_config_dict(self) -> dict[str, Any]:
        """What the module shows when it is printed."""
        settings = self.encoder.settings
        return {"kind": settings.kind, "variant": settings.variant, "embedding_dim": settings.embedding_dim}


def _precision(given: Sequence[Any]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in given if dtype is not None and dtype != "auto"]
    wanted = names[0] if names else "float32"
    precisions = {"float32": "fp32", "bfloat16": "bf16"}
    if wanted not in precisions:
        raise ModelError(f"dtype {wanted} is not supported: use float32 or bfloat16")
    return precisions[wanted]
