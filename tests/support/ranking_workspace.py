"""A small workspace of the recommender, as its stages would leave it: sequences, notes, summaries, preferences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core import schema
from notellm2_ray.core.settings import Settings
from tests.support.tiny_models import picture, save_clip, save_llm

NUM_USERS, NUM_NOTES, LENGTH, NEGATIVES = 60, 24, 6, 4
START = datetime(2024, 1, 1, tzinfo=UTC)
NOTES = [f"n{at}" for at in range(NUM_NOTES)]


def save(path: Path, rows: Sequence[Mapping[str, Any]], kind: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, kind), path)


def sequence_of(user: int) -> list[str]:
    """The notes of a user: half of a circle of notes, of one of two kinds."""
    return [NOTES[(2 * (user // 2 + step) + user % 2) % NUM_NOTES] for step in range(LENGTH)]


def write_sequences(home: Path, draws: int = 0) -> None:
    """The directory of the sequences stage: 40 users train, 10 validate, 10 test; ``draws`` seeds the negatives."""
    rng = np.random.default_rng(draws)
    rows, examples = [], {"train": [], "valid": [], "test": []}
    blocks, candidates = [], {"valid": [], "test": [], "train": []}
    for user in range(NUM_USERS):
        notes, name = sequence_of(user), f"u{user}"
        times = [START + timedelta(days=user, hours=step) for step in range(LENGTH)]
        rows.append({"user_id": name, "note_ids": notes, "timestamps": times, "session_ids": [None] * LENGTH})
        side = "train" if user < 40 else "valid" if user < 50 else "test"
        example = {"example_id": f"{name}/5", "user_id": name, "block": 1, "history_ids": notes[:-1]}
        examples[side].append({**example, "target_id": notes[-1], "timestamp": times[-1]})
        blocks += [{"user_id": name, "block": b, "note_ids": notes[3 * b : 3 * b + 3][: 5 - 3 * b]} for b in (0, 1)]
        others = rng.permutation([note for note in NOTES if note not in notes])[:NEGATIVES]
        shown = [(notes[-1], 1), *((str(note), 0) for note in others)]
        candidates[side] += [{"example_id": f"{name}/5", "note_id": note, "label": label} for note, label in shown]
    save(home / "sequences.parquet", rows, schema.SEQUENCE_SCHEMA)
    save(home / "blocks.parquet", blocks, schema.BLOCK_SCHEMA)
    for side, table in examples.items():
        save(home / f"{side}.parquet", table, schema.EXAMPLE_SCHEMA)
    for protocol in ("uniform", "popular"):
        save(home / "candidates" / f"{protocol}.parquet", candidates["test"], schema.CANDIDATE_SCHEMA)
    clicks = [{"note_id": note, "clicks": at % 3} for at, note in enumerate(NOTES)]
    save(home / "popularity.parquet", clicks, pa.schema([("note_id", pa.string()), ("clicks", pa.int64())]))
    (home / "statistics.json").write_text('{"users": 60}')


def write(home: Path) -> Path:
    """A whole workspace, with random models."""
    write_sequences(home / "sequences")
    # A note's picture and the words of its summary show its kind; one note has no picture.
    notes = [
        {"note_id": note, "title": f"title {note}", "topics": [], "content": "", "created_at": None,
         "image": picture(at % 2) if at else None}
        for at, note in enumerate(NOTES)
    ]  # fmt: skip
    save(home / "prepared" / "notes" / "part.parquet", notes, schema.NOTE_SCHEMA)
    words = ("red round cat", "a small green house")
    texts = [
        {"note_id": note, "summary": words[at % 2], "prompt_tokens": 1, "generated_tokens": 1}
        for at, note in enumerate(NOTES)
    ]
    save(home / "image_summaries" / "summaries.parquet", texts, schema.SUMMARY_SCHEMA)
    tastes = [
        {
            "user_id": f"u{user}",
            "block": b,
            "preference": f"The user likes kind {user % 2}",
            "prompt_tokens": 1,
            "generated_tokens": 1,
        }
        for user in range(50, 60)
        for b in (0, 1)
    ]
    save(home / "preferences" / "recurrent" / "preferences.parquet", tastes, schema.PREFERENCE_SCHEMA)
    (home / "rankers" / "mllm_msr-seed1").mkdir(parents=True)
    history = [json.dumps({"step": step, "loss": 1 / (step + 1), "valid_auc": 0.6}) for step in range(5)]
    (home / "rankers" / "mllm_msr-seed1" / "history.jsonl").write_text("\n".join(history))
    save_clip(home / "clip")
    save_llm(home / "llm")
    return home


def settings_for(workspace: Path, **changed: Any) -> Settings:
    ranking = {"seeds": [1, 2], "cutoffs": [1, 3], "sample_users": 3, **changed.pop("ranking", {})}
    model = {"llm": str(workspace / "llm"), "vision": str(workspace / "clip")}
    return Settings.model_validate({"workspace": str(workspace), "ranking": ranking, "model": model, **changed})


def write_scores(path: Path, protocol: str, workspace: Path, strength: float, seed: int) -> Path:
    rows = pq.read_table(workspace / "sequences" / "candidates" / f"{protocol}.parquet").to_pylist()
    noise = np.random.default_rng(seed).random(len(rows))
    save(
        path,
        [{**row, "score": n + strength * row["label"]} for row, n in zip(rows, noise, strict=True)],
        schema.SCORE_SCHEMA,
    )
    return path
