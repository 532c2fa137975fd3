"""What the embedding benchmarks need: notes of the synthetic world, and a tiny, hardly trained embedder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.config import build, merge
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.core.settings import Settings
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.presets import preset

SEED = 42
ROWS_PER_FILE = 10_000


def write_world_notes(directory: Path, count: int, row_group_size: int) -> Path:
    """Write ``count`` unbroken notes of the world, with drawn JPEGs and its text lengths, as `prepare` does."""
    from notellm2_ray.data.sources.world import raw_notes

    world = WorldSettings(num_notes=count, broken_share=0.0)
    directory.mkdir(parents=True, exist_ok=True)
    for file, start in enumerate(range(0, count, ROWS_PER_FILE)):
        table = raw_notes(world, SEED, np.arange(start, min(start + ROWS_PER_FILE, count)))
        table = table.select(NOTE_SCHEMA.names).cast(NOTE_SCHEMA)
        pq.write_table(table, directory / f"part-{file:05d}.parquet", row_group_size=row_group_size)
    return directory


def build_tiny_embedder(directory: Path, notes: Path, name: str = "model", **changes: Any) -> Path:
    """An embedder of the demo's sizes and with its tokenizer, but hardly trained; its speed is the same.

    Args:
        directory: gets the parts, which are made once, and the embedder.
        name: name of the embedder's directory.
        changes: changes to the demo's model settings.
    """
    from notellm2_ray.data.sources.world import captions
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.models.tiny.clip import train_tiny_clip
    from notellm2_ray.models.tiny.llm import train_tiny_llm

    settings: Settings = build(Settings, merge(preset("demo"), {"model": changes}))
    brief = settings.tiny.model_copy(update={"llm_steps": 1, "clip_steps": 1})
    if not (directory / "clip").exists():
        train_tiny_llm(_texts(notes, 2000), brief, directory / "llm", SEED)
        train_tiny_clip(captions(WorldSettings(), SEED, 400), brief, directory / "clip", SEED, directory / "llm")
    paths = {"llm_path": str(directory / "llm"), "vision_path": str(directory / "clip")}
    build_encoder(settings.model, SEED, **paths).save_pretrained(directory / name)
    return directory / name


def _texts(notes: Path, limit: int) -> itertools.islice:
    def all_texts() -> Any:
        for path in sorted(notes.glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(columns=["title", "content"]):
                for row in pa.Table.from_batches([batch]).to_pylist():
                    yield f"{row['title']}\n{row['content']}"

    return itertools.islice(all_texts(), limit)
