"""The table of image summaries: note id and the image in words."""

from __future__ import annotations

from pathlib import Path


def read_summaries(table: Path | None) -> dict[str, str]:
    """Note id to image summary; empty without a table, since summaries are optional."""
    import pyarrow.parquet as pq

    if table is None or not table.is_file():
        return {}
    columns = pq.read_table(table, columns=["note_id", "summary"])
    return dict(zip(columns["note_id"].to_pylist(), columns["summary"].to_pylist(), strict=True))
