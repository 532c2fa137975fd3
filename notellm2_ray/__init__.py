"""NoteLLM-2 and MLLM-MSR on Ray: multimodal note embeddings, recall, and LLM ranking.

What a user of an embedder needs is here: ``from notellm2_ray import Note, NoteEncoder``. Both are imported when they
are first asked for, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from notellm2_ray.core.schema import Note
    from notellm2_ray.models.embedder.encoder import NoteEncoder

__all__ = ["Note", "NoteEncoder", "__version__"]
__version__ = "0.1.0"

_HOMES = {"Note": "notellm2_ray.core.schema", "NoteEncoder": "notellm2_ray.models.embedder.encoder"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
