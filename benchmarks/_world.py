"""What the embedding benchmarks need: notes of the synthetic world, and a tiny, hardly trained embedder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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


def build_tiny_embedder(directory: Path, name: str = "model", **changes: Any) -> Path:
    """An untrained embedder of the demo's sizes; its speed is that of a trained one.

    Args:
        directory: gets the embedder.
        name: name of the embedder's directory.
        changes: changes to the demo's model settings.
    """
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.pipeline.embedders import model_paths

    settings: Settings = build(Settings, merge(preset("demo"), {"model": changes}))
    llm, vision = model_paths(settings)
    build_encoder(settings.model, SEED, llm_path=llm, vision_path=vision).save_pretrained(directory / name)
    return directory / name
