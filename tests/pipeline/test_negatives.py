"""One run trains an embedder, mines its negatives, trains another with them, and indexes and compares short vectors."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from notellm2_ray import cli
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.models.embedder.encoder import NoteEncoder

SETTINGS = [
    "source.num_notes=150",
    "source.num_users=60",
    "model.variant=text_only",
    "model.embedding_dim=16",
    "train.engine=plain",
    "train.max_steps=3",
    "train.batch_pairs=8",
    "train.cpus_per_worker=1",
    "train.dimensions=[16,8]",
    "embed.cpus_per_actor=1",
    "embed.dimensions=8",
    "embedders.hard.model={variant: text_only}",
    "embedders.hard.train={hard_negatives: 2, negatives_of: text_only}",
    "embedder=hard",
    "evaluate.embedders=[hard]",
    "evaluate.baselines=[random]",
    "evaluate.sample_queries=1",
    "negatives.min_rank=2",
    "negatives.per_pair=5",
]


@pytest.mark.slow
def test_one_run_mines_negatives_and_trains_with_them(ray_cluster, tmp_path, capsys):
    command = ["run-retrieval", "--preset", "demo", f"workspace={tmp_path}", *SETTINGS]
    cli.main(command)
    mined = pq.read_table(tmp_path / "negatives" / "text_only-seed42" / "negatives.parquet").to_pylist()
    pairs = tmp_path / "pairs"
    relations = [*mined, *pq.read_table(pairs / "valid.parquet").to_pylist()]
    related = {frozenset((row["query_id"], row["target_id"])) for row in relations}
    assert any(row["negatives"] for row in mined)
    for row in mined:
        assert row["query_id"] not in row["negatives"] and len(row["negatives"]) <= 5
        assert not related & {frozenset((row["query_id"], note)) for note in row["negatives"]}
    assert json.loads((tmp_path / "embedders" / "hard-seed42" / "training.json").read_text())["steps"] == 3
    assert NoteEncoder.from_pretrained(tmp_path / "embedders" / "hard-seed42" / "model").lengths == (16, 8)
    assert AnnIndex.load(tmp_path / "index" / "hard-seed42").dim == 8
    results = json.loads((tmp_path / "report" / "retrieval" / "results.json").read_text())
    assert "hard" in [row["method"] for row in results["rows"]]
    capsys.readouterr()
    cli.main([*command, "--dry-run"])
    assert "to do" not in capsys.readouterr().out
