"""Notes with JPEGs as large as photos, drawn at random: for benchmarks that need what decoding costs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from notellm2_ray.core.schema import NOTE_SCHEMA

WORDS = [
    *("harbour", "dawn", "fishing", "boats", "quiet", "water", "light", "red", "roof"),
    *("cat", "sofa", "travel", "food", "street", "market", "rain", "evening"),
]


def write_photos(path: Path, notes: int, side: int, rows: int) -> Path:
    """A Parquet file of notes with JPEGs of ``side`` x ``side`` pixels and texts of some 100 words."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(24):
        coarse = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        grain = np.asarray(coarse, np.int16) + draw.integers(-12, 13, (side, side, 3))
        file = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        images.append(file.getvalue())
    table = [
        {
            "note_id": f"n{number}",
            "title": " ".join(draw.choice(WORDS, 8)),
            "topics": list(draw.choice(WORDS, 3)),
            "content": " ".join(draw.choice(WORDS, int(draw.integers(40, 160)))),
            "image": images[number % len(images)],
            "created_at": None,
        }
        for number in range(notes)
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=NOTE_SCHEMA), path, row_group_size=rows)
    return path
