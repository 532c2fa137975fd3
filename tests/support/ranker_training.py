"""A small set of users, notes and candidates whose likes can be told from the taste and the title."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.schema import CANDIDATE_SCHEMA, EXAMPLE_SCHEMA, NOTE_SCHEMA, PREFERENCE_SCHEMA
from notellm2_ray.core.settings import RankerSettings, TuneSettings
from tests.support.tiny_mllm import picture, save_mllm

NUM_NOTES, NUM_USERS = 16, 12


def write(directory: Path, *, test_negatives: int = 3, missing: tuple[str, ...] = ()) -> Path:
    """mllm/, notes/, sequences/ and preferences.parquet under ``directory``; notes named in ``missing`` are not there.

    Half of the notes are red, half blue; users like one colour. Users 0 and 1 have no history, every fourth note no
    image.
    """
    save_mllm(directory / "mllm", answers="certain")
    rows = [_note(i) for i in range(NUM_NOTES) if f"n{i}" not in missing]
    _write(directory / "notes" / "a.parquet", rows[:9], NOTE_SCHEMA)
    _write(directory / "notes" / "b.parquet", rows[9:], NOTE_SCHEMA)
    rng = np.random.default_rng(0)
    sequences = directory / "sequences"
    for split, users in (("train", range(8)), ("valid", range(8, 10)), ("test", range(NUM_USERS))):
        examples = [_example(user, rng) for user in users]
        _write(sequences / f"{split}.parquet", examples, EXAMPLE_SCHEMA)
        name = "uniform" if split == "test" else split
        negatives = test_negatives if split == "test" else 1
        rows = [row for example in examples for row in _candidates(example, negatives, rng)]
        _write(sequences / "candidates" / f"{name}.parquet", rows, CANDIDATE_SCHEMA)
    likes = [
        {"user_id": f"u{user}", "block": 0, "preference": f"likes {_colour(user)}", "prompt_tokens": 1}
        for user in range(2, NUM_USERS)
    ]
    _write(directory / "preferences.parquet", [{**row, "generated_tokens": 1} for row in likes], PREFERENCE_SCHEMA)
    return directory


def tune_settings(**changes: Any) -> TuneSettings:
    small = {
        "engine": "plain",
        "batch_size": 4,
        "epochs": 4,
        "learning_rate": 5e-3,
        "precision": "fp32",
        "lora_dropout": 0.0,
        "max_batch_tokens": 300,
        "validate_every_steps": 5,
        "checkpoint_every_steps": 5,
    }
    return TuneSettings(**{**small, **changes})


def ranker_settings(**changes: Any) -> RankerSettings:
    return RankerSettings(**{"max_image_pixels": 3200, **changes})


def _colour(number: int) -> str:
    return ("red", "blue")[number % 2]


def _note(number: int) -> dict[str, Any]:
    image = None if number % 4 == 3 else picture(number % 2, 28 + 28 * (number % 3))
    text = {"title": f"{_colour(number)} {'cat ' * (number % 5)}", "topics": [], "content": ""}
    return {"note_id": f"n{number}", **text, "image": image, "created_at": None}


def _example(user: int, rng: np.random.Generator) -> dict[str, Any]:
    liked = [f"n{i}" for i in rng.permutation(np.arange(user % 2, NUM_NOTES, 2))[:4]]
    cold = user < 2
    return {
        "example_id": f"u{user}/{0 if cold else 3}",
        "user_id": f"u{user}",
        "block": -1 if cold else 0,
        "history_ids": [] if cold else liked[:3],
        "target_id": liked[3],
        "timestamp": 1_000_000 * user,
    }


def _candidates(example: dict[str, Any], negatives: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    other = 1 - int(example["user_id"][1:]) % 2
    drawn = rng.permutation(np.arange(other, NUM_NOTES, 2))[:negatives]
    rows = [(example["target_id"], 1), *((f"n{i}", 0) for i in drawn)]
    return [{"example_id": example["example_id"], "note_id": note, "label": label} for note, label in rows]


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
