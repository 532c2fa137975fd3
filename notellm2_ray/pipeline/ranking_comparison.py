"""Compares every ranker, control and baseline on the same candidates, and writes the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.schema import Note, iter_notes
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.embedders import model_paths
from notellm2_ray.pipeline.ranking_outputs import PREFERENCES, Scored, needs_tiny_embedder_parts
from notellm2_ray.pipeline.seeds import ranking_workspace, recall_workspace, with_ranking_seed, with_recall_seed
from notellm2_ray.pipeline.stage import workspace_of

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
    from notellm2_ray.evaluate.ranking.results import Kind, MethodScores
    from notellm2_ray.evaluate.ranking.task import RankingTask

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
    from notellm2_ray.evaluate.ranking.results import evaluate_protocol
    from notellm2_ray.evaluate.ranking.tables import printed

    draws = _draws(settings, workspace)
    first = draws[0]
    methods = _methods(draws, scores)
    results: dict[str, Any] = {"protocols": {}, "remarks": _remarks(replace(first.data, settings=settings))}
    for at, protocol in enumerate(first.data.protocols):
        name = protocol.task.protocol
        drawn: dict[int | None, RankingTask] = {
            seed: draw.data.protocols[at].task for draw in draws[1:] for seed in draw.seeds
        }
        results["protocols"][name] = evaluate_protocol(
            protocol.task, methods[name], settings.ranking, settings.seed, drawn=drawn
        )
    results["tuned_baselines"] = {
        f"{name}, seed {draw.seeds[0]}" if at else name: one
        for at, draw in enumerate(draws)
        for name, one in draw.data.tuned.items()
    }
    write_atomically(output / "results.json", json.dumps(results, indent=1))
    write_atomically(output / "table.txt", printed(results))
    _report(first.data, methods, results, output)
    return _brief(results)


class _Draw(NamedTuple):
    """The seeds that share what is random before training, and what their baselines are given."""

    seeds: tuple[int, ...]
    data: RankingData
    first: bool


def _draws(settings: Settings, workspace: Workspace) -> list[_Draw]:
    """The first seed with those that share its draws, and then each seed with draws of its own."""
    own = {seed: _own_workspace(settings, workspace, seed) for seed in settings.ranking.seeds}
    shared = tuple(seed for seed, home in own.items() if not home.own)
    groups = [shared, *((seed,) for seed in own if seed not in shared)]
    return [_Draw(seeds, _data(settings, own[seeds[0]], seeds), seeds is shared) for seeds in groups]


def _own_workspace(settings: Settings, workspace: Workspace, seed: int) -> Workspace:
    own = ranking_workspace(with_ranking_seed(settings, seed)).own
    if needs_tiny_embedder_parts(settings):
        own |= recall_workspace(with_recall_seed(settings, seed)).own if seed != settings.ranking.seeds[0] else set()
    return Workspace(workspace.root, seed, own)


def _data(settings: Settings, workspace: Workspace, seeds: tuple[int, ...]) -> RankingData:
    from notellm2_ray.baselines.ranking.data import RankingData, read_protocol

    llm, vision = model_paths(with_recall_seed(settings, seeds[0]))
    ranking = settings.ranking.model_copy(update={"seeds": seeds})
    protocols = [read_protocol(workspace, name) for name in settings.candidates.protocols]
    narrowed = settings.model_copy(update={"ranking": ranking})
    return RankingData(narrowed, workspace, protocols, llm, settings.ranking.image_tower or vision)


def _brief(results: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in results["protocols"].items():
        found |= {f"{name}_targets": one["examples"]["all"], f"{name}_rows": len(one["rows"])}
        rankers = [row for row in one["rows"] if row["kind"] == "ranker"]
        found |= {f"{name}_auc_{row['method']}": row["figures"]["all"]["auc"]["mean"] for row in rankers}
    return found


def _methods(draws: Sequence[_Draw], scores: Mapping[Scored, Path]) -> dict[str, list[MethodScores]]:
    """The rows of each protocol, with the seeds of all draws put together."""
    from notellm2_ray.evaluate.ranking.results import MethodScores

    found: dict[str, list[MethodScores]] = {}
    for at, protocol in enumerate(draws[0].data.protocols):
        rows: dict[str, MethodScores] = {}
        for draw in draws:
            for one in _methods_of(draw, draw.data.protocols[at], scores):
                # Of several draws, what is computed without a seed differs by its candidates.
                by_seed = {draw.seeds[0] if s is None and len(draws) > 1 else s: v for s, v in one.scores.items()}
                before = rows[one.method].scores if one.method in rows else {}
                rows[one.method] = MethodScores(one.method, one.kind, {**before, **by_seed})
        found[protocol.task.protocol] = list(rows.values())
    return found


def _methods_of(draw: _Draw, protocol: ProtocolData, scores: Mapping[Scored, Path]) -> Iterator[MethodScores]:
    """Rows in the order of the tables: baselines in the order of the settings, then rankers, then controls."""
    from notellm2_ray.baselines.ranking.table import named
    from notellm2_ray.evaluate.ranking.results import MethodScores

    seeds = {*draw.seeds, *((None,) if draw.first else ())}  # untuned models have no seed in the first draw
    tables = _by_method(protocol, {table: path for table, path in scores.items() if table.seed in seeds})
    for name, row in named(draw.data.settings).items():
        if row.scores is not None:
            yield MethodScores(name, "baseline", row.scores(draw.data, protocol))
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
    return table.method, "ranker" if table.tuned else "untuned"


def _remarks(data: RankingData) -> list[str]:
    from notellm2_ray.baselines.ranking.table import in_table_order

    remarks = [
        "Cold and warm targets differ in the clicks on them that may be known, without those to predict. Sequential "
        "baselines are trained on the training users' sequences and on other users' events before their targets. "
        "Training stops by AUC on validation targets. All notes unseen in training get the same score."
    ]
    statistics = json.loads(data.workspace.sequence_statistics.read_text(encoding="utf-8"))
    if statistics.get("tied_targets"):
        with_target = statistics["users"] - statistics["cold_users"]
        remarks.append(
            f"{statistics['tied_targets']:,} of {with_target:,} users liked the last two notes of their history at one "
            f"time; such likes are ordered by {statistics['ties_follow']}."
        )
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
    from notellm2_ray.core.summary_table import read_summaries
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
        summaries=read_summaries(workspace.summary_table),
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
