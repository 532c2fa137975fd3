"""Compares every ranker, control and baseline on the same candidates, and writes the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.schema import Note, iter_notes
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.embedders import model_paths
from notellm2_ray.pipeline.ranking_outputs import PREFERENCES, Scored
from notellm2_ray.pipeline.stage import workspace_of

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
    from notellm2_ray.evaluate.ranking.results import Kind, MethodScores

CONTROL_NAMES = {"shuffled_image": "shuffled image", "other_preference": "another user's preference"}


def compare_ranking(
    settings: Settings, workspace: Workspace, scores: Mapping[Scored, Path], output: Path
) -> dict[str, Any]:
    """All figures of all methods under every protocol, written as results.json, table.txt and the report.

    Args:
        settings: of the run; ``ranking`` names baselines, cutoffs and seeds.
        scores: files of the score tables (SCORE_SCHEMA) of rankers, controls and untuned models.
        output: an existing directory.

    Returns:
        Counts for the manifest, with each ranker's AUC. results.json holds ``{"protocols": {name: results of
        evaluate_protocol}, "remarks": [...], "tuned_baselines": {...}}``.

    Raises:
        DataError: scores and sequences do not belong together.
        ModelError: a baseline's weights are missing.
    """
    from notellm2_ray.baselines.ranking.data import RankingData, read_protocol
    from notellm2_ray.evaluate.ranking.results import evaluate_protocol
    from notellm2_ray.evaluate.ranking.tables import printed

    llm, vision = model_paths(settings)
    protocols = [read_protocol(workspace, name) for name in settings.candidates.protocols]
    data = RankingData(settings, workspace, protocols, llm, settings.ranking.image_tower or vision)
    methods = {protocol.task.protocol: list(_methods(data, protocol, scores)) for protocol in protocols}
    results: dict[str, Any] = {"protocols": {}, "remarks": _remarks(data), "tuned_baselines": data.tuned}
    for protocol in protocols:
        results["protocols"][protocol.task.protocol] = evaluate_protocol(
            protocol.task, methods[protocol.task.protocol], settings.ranking, settings.seed
        )
    write_atomically(output / "results.json", json.dumps(results, indent=1))
    write_atomically(output / "table.txt", printed(results))
    _report(data, methods, results, output)
    return _brief(results)


def _brief(results: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in results["protocols"].items():
        found |= {f"{name}_targets": one["examples"]["all"], f"{name}_rows": len(one["rows"])}
        rankers = [row for row in one["rows"] if row["kind"] == "ranker"]
        found |= {f"{name}_auc_{row['method']}": row["figures"]["all"]["auc"]["mean"] for row in rankers}
    return found


def _methods(data: RankingData, protocol: ProtocolData, scores: Mapping[Scored, Path]) -> Iterator[MethodScores]:
    """Rows in the order of the tables: baselines in the order of the settings, then rankers, then controls."""
    from notellm2_ray.baselines.ranking.table import named
    from notellm2_ray.evaluate.ranking.results import MethodScores

    tables = _by_method(protocol, scores)
    for name, row in named(data.settings).items():
        if row.scores is not None:
            yield MethodScores(name, "baseline", row.scores(data, protocol))
        elif name in tables:
            yield tables.pop(name)
    yield from sorted(tables.values(), key=lambda method: method.kind == "control")


def _by_method(protocol: ProtocolData, scores: Mapping[Scored, Path]) -> dict[str, MethodScores]:
    """The scores of a protocol by method; the seeds of one method are put together."""
    from notellm2_ray.evaluate.ranking.results import MethodScores

    found: dict[str, tuple[Kind, dict[int | None, np.ndarray]]] = {}
    for table, path in scores.items():
        if table.protocol != protocol.task.protocol:
            continue
        name, kind = row_name(table)
        values = protocol.task.align(pq.read_table(path), f"scores of {name} ({path})")
        found.setdefault(name, (kind, {}))[1][table.seed] = values
    return {name: MethodScores(name, kind, seeds) for name, (kind, seeds) in found.items()}


def row_name(table: Scored) -> tuple[str, Kind]:
    """A score table's name in the results, and the kind of its row."""
    if table.control is not None:
        return f"{table.method}, {CONTROL_NAMES[table.control]}", "control"
    return table.method, "untuned" if table.seed is None else "ranker"


def _remarks(data: RankingData) -> list[str]:
    from notellm2_ray.baselines.ranking.table import in_table_order

    remarks = [
        "Cold and warm targets differ in the clicks on them that may be known, without those to predict. Sequential "
        "baselines are trained on the training users' sequences and on other users' events before their targets. "
        "Training stops by AUC on validation targets. All notes unseen in training get the same score."
    ]
    return [*remarks, *(row.remark(data) for row in in_table_order(data.settings).values() if row.remark is not None)]


def _report(
    data: RankingData, methods: Mapping[str, Sequence[MethodScores]], results: Mapping[str, Any], output: Path
) -> None:
    from notellm2_ray.evaluate.ranking.report import write_report

    write_report(
        output,
        results=results,
        statistics=json.loads(data.workspace.sequence_statistics.read_text(encoding="utf-8")),
        histories=_histories(data.workspace, data.settings),
        samples=_samples(data, methods),
        settings=to_plain(data.settings),
        sweeps=_sweeps(data.workspace),
    )


def _samples(data: RankingData, methods: Mapping[str, Sequence[MethodScores]]) -> list[dict[str, Any]]:
    """Users of the first protocol, with the ranking of the first ranker's first seed."""
    from notellm2_ray.baselines.ranking.data import read_summaries
    from notellm2_ray.evaluate.ranking.samples import sample_users

    settings, workspace, protocol = data.settings, data.workspace, data.protocols[0]
    name = protocol.task.protocol
    shown = next((method for method in methods[name] if method.kind == "ranker"), None)
    if shown is None or not settings.ranking.sample_users:
        return []
    return sample_users(
        protocol.task,
        next(iter(shown.scores.values())),
        protocol.examples,
        pq.read_table(workspace.blocks("published" if name == "published" else "")),
        get_notes=lambda ids: _notes(workspace, ids),
        summaries=read_summaries(workspace),
        preferences=_preferences(settings, shown.method, name),
        method=shown.method,
        count=settings.ranking.sample_users,
        seed=settings.seed,
    )


def _notes(workspace: Workspace, ids: Sequence[str]) -> dict[str, Note]:
    table = ds.dataset(workspace.notes).to_table(filter=ds.field("note_id").isin(list(ids)))
    return {note.note_id: note for note in iter_notes(table)}


def _preferences(settings: Settings, ranker: str, protocol: str) -> dict[tuple[str, int], str]:
    """Preferences by (user, block); empty if the ranker reads none."""
    variant = next((kind for name, kind in PREFERENCES.items() if name == ranker), None)
    if variant is None:
        return {}
    # The published protocol has its own histories and so its own preferences.
    history = "published" if protocol == "published" else ""
    path = workspace_of(settings).preference_table(variant, history)
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["user_id", "block", "preference"])
    return {(row["user_id"], row["block"]): row["preference"] for row in table.to_pylist()}


def _histories(workspace: Workspace, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """The logged training steps of every ranker that has a log."""
    found = {}
    for variant in settings.ranking.rankers:
        for seed in settings.ranking.seeds:
            path = workspace.ranker_history(f"{variant}-seed{seed}")
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                found[f"{variant}-seed{seed}"] = [json.loads(line) for line in lines]
    return found


def _sweeps(workspace: Workspace) -> list[dict[str, Any]]:
    """Results of `notellm2 sweep` in this workspace."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in workspace.sweep_results()]
