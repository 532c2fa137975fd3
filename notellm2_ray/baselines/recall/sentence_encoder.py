"""A ready sentence encoder over title, topics and content: what one has without any training.

It is loaded with sentence-transformers, and so with its own pooling, prompt and normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notellm2_ray.baselines.recall.baseline import Ranks, RecallBaseline, RecallData
from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.words import note_text
from notellm2_ray.evaluate.recall.metrics import target_ranks


def sentence_vectors(model: str, texts: Sequence[str]) -> np.ndarray:
    """(N, D) float32 unit vectors of texts; equal texts are encoded once.

    Raises:
        ConfigError: sentence-transformers is not installed.
        ModelError: the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            "the baseline sentence_encoder needs: pip install 'notellm2-ray[sentence-transformers]'"
        ) from error
    encoder = _load(SentenceTransformer, model)
    distinct, rows = np.unique(np.array(texts, dtype=object), return_inverse=True)
    vectors = encoder.encode(distinct.tolist(), normalize_embeddings=True, convert_to_numpy=True)
    return np.asarray(vectors, np.float32)[rows]


def _load(kind: Any, model: str) -> Any:
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"evaluate.sentence_encoder: {model} is not a model directory: it has no config.json")
    try:
        return kind(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"evaluate.sentence_encoder: {model} cannot be loaded: {reason}") from error


def _ranks(data: RecallData) -> Ranks:
    task = data.task
    ids = [*task.pool_ids, *task.query_ids]
    vectors = sentence_vectors(data.settings.evaluate.sentence_encoder, [note_text(data.notes[one]) for one in ids])
    pool, queries = vectors[: len(task.pool_ids)], vectors[len(task.pool_ids) :]
    return {None: target_ranks(queries, pool, task.query_rows, task.target_rows)}


BASELINE = RecallBaseline("text", _ranks)
