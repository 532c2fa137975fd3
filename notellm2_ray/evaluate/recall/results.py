"""Compares methods on the test pairs; tables and report are made from the results.

Used as::

    task = RetrievalTask.build(pairs, pool_ids, token_counts, settings.evaluate)
    ranks = {seed: task.embedding_ranks(*read_vectors(table)) for seed, table in tables.items()}
    results = evaluate(task, [MethodRanks("basic", "multimodal", ranks), ...])  # plain JSON values
    print(recall_table(results))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.evaluate.recall import metrics
from notellm2_ray.evaluate.recall.task import RetrievalTask
from notellm2_ray.evaluate.statistics import LEVEL, compare, mean_and_deviation

CURVE_STRATA = ("all", "short_query")
CURVE_POINTS = 40


@dataclass(frozen=True)
class MethodRanks:
    """A method's ranks on the pairs of a task.

    Attributes:
        method: its name in the tables.
        inputs: what it was tested with: "multimodal", "image", "text" or "-". A method may be given several times with
            different inputs, its main ones first.
        ranks: training seed to (Q,) ranks; a deterministic method has the one seed None.
        baseline: whether embedders are tested against it.
    """

    method: str
    inputs: str
    ranks: Mapping[int | None, np.ndarray]
    baseline: bool = False

    @property
    def fixed(self) -> bool:
        return set(self.ranks) == {None}

    def hits(self, k: int, mask: np.ndarray) -> np.ndarray:
        """(S, M) bool: for each seed and pair of the stratum, whether the target is among the first k."""
        return np.stack([ranks[mask] <= k for ranks in self.ranks.values()])


def evaluate(task: RetrievalTask, rankings: Sequence[MethodRanks], reference: str | None = None) -> dict[str, Any]:
    """Recall of every method, and the tests between methods, as JSON values.

    Args:
        task: the pairs.
        rankings: the methods' ranks, in the order of the tables.
        reference: a method, such as "basic", that all others are tested against as well, with its main inputs.

    Returns:
        ``pool_notes``, ``pairs`` (per stratum), ``cutoffs``, ``saturated``, ``chance`` (per cutoff) and
        ``rows``: method, inputs, baseline, main, seeds, ``recall[stratum][cutoff] = {mean, deviation, seeds}``,
        ``mrr[stratum]``, ``curve[stratum] = {k, recall}``;
        ``tests``: method, inputs, against, against_inputs, role ("best baseline" or "reference"), stratum, cutoff,
        difference, p_seeds, seeds_test, p_queries, deciding, significant.
        Figures are shares from 0 to 1, or None if there are no pairs.

    Raises:
        DataError: the number of ranks is not that of the pairs, or a method is given twice with the same inputs.
    """
    _check(task, rankings, reference)
    seen: set[str] = set()
    rows = []
    for ranking in rankings:
        rows.append(_row(task, ranking, main=ranking.method not in seen))
        seen.add(ranking.method)
    return {
        "pool_notes": len(task.pool_ids),
        "pairs": {name: int(mask.sum()) for name, mask in task.strata.items()},
        "cutoffs": list(task.cutoffs),
        "saturated": list(task.saturated),
        "chance": _keyed(metrics.chance_at(len(task.pool_ids), task.query_rows, task.cutoffs)),
        "level": LEVEL,
        "rows": rows,
        "tests": _tests(task, rankings, rows, reference),
    }


def _row(task: RetrievalTask, ranking: MethodRanks, main: bool) -> dict[str, Any]:
    return {
        "method": ranking.method,
        "inputs": ranking.inputs,
        "baseline": ranking.baseline,
        "main": main,
        "seeds": [seed for seed in ranking.ranks if seed is not None],
        "recall": {
            name: {
                str(k): _spread(ranking, mask, lambda ranks, k=k: metrics.recall_at(ranks, [k])[k])
                for k in task.cutoffs
            }
            for name, mask in task.strata.items()
        },
        "mrr": {name: _spread(ranking, mask, metrics.mean_reciprocal_rank) for name, mask in task.strata.items()},
        "curve": {name: _curve(task, ranking, task.strata[name]) for name in CURVE_STRATA},
    }


def _spread(ranking: MethodRanks, mask: np.ndarray, figure: Any) -> dict[str, Any] | None:
    if not mask.any():
        return None
    values = {str(seed): figure(ranks[mask]) for seed, ranks in ranking.ranks.items()}
    mean, deviation = mean_and_deviation(list(values.values()))
    return {"mean": mean, "deviation": deviation, "seeds": {seed: v for seed, v in values.items() if seed != "None"}}


def _curve(task: RetrievalTask, ranking: MethodRanks, mask: np.ndarray) -> dict[str, list[float]] | None:
    """Recall for k from 1 to the whole pool, mean over seeds."""
    if not mask.any():
        return None
    ks = np.unique(np.geomspace(1, max(len(task.pool_ids) - 1, 1), CURVE_POINTS).round().astype(int))
    return {"k": ks.tolist(), "recall": [float(ranking.hits(k, mask).mean()) for k in ks]}


def _tests(
    task: RetrievalTask, rankings: Sequence[MethodRanks], rows: Sequence[dict[str, Any]], reference: str | None
) -> list[dict[str, Any]]:
    groups = np.unique(task.query_ids.astype(str), return_inverse=True)[1]
    found = []
    for stratum, mask in task.strata.items():
        if not mask.any():
            continue
        for k in (k for k in task.cutoffs if k not in task.saturated):
            for ranking, other, role in _matches(rankings, rows, stratum, k, reference):
                test = compare(
                    ranking.hits(k, mask),
                    other.hits(k, mask),
                    groups[mask],
                    fixed=ranking.fixed,
                    other_fixed=other.fixed,
                )
                names: dict[str, Any] = {"method": ranking.method, "inputs": ranking.inputs, "against": other.method}
                names |= {"against_inputs": other.inputs, "role": role, "stratum": stratum, "cutoff": k}
                found.append({**names, **test._asdict(), "deciding": test.deciding, "significant": test.significant})
    return found


def _matches(
    rankings: Sequence[MethodRanks], rows: Sequence[dict[str, Any]], stratum: str, k: int, reference: str | None
) -> list[tuple[MethodRanks, MethodRanks, str]]:
    """Which methods are compared: each one with the best baseline of this stratum and k, and with the reference."""
    means = [row["recall"][stratum][str(k)]["mean"] for row in rows]
    baselines = [at for at, ranking in enumerate(rankings) if ranking.baseline]
    best = max(baselines, key=lambda at: means[at], default=None)
    anchor = next((at for at, ranking in enumerate(rankings) if ranking.method == reference), None)
    matches = []
    for at, ranking in enumerate(rankings):
        if best is not None and not ranking.baseline:
            matches.append((ranking, rankings[best], "best baseline"))
        if anchor is not None and at != anchor:
            matches.append((ranking, rankings[anchor], "reference"))
    return matches


def _check(task: RetrievalTask, rankings: Sequence[MethodRanks], reference: str | None) -> None:
    keys = [(ranking.method, ranking.inputs) for ranking in rankings]
    if len(set(keys)) != len(keys):
        raise DataError(f"a method is given twice with the same inputs among {keys}")
    if reference is not None and reference not in {method for method, _ in keys}:
        raise DataError(f"the reference {reference!r} is not among the methods {keys}")
    for ranking in rankings:
        for seed, ranks in ranking.ranks.items():
            if len(ranks) != task.num_pairs:
                raise DataError(f"{ranking.method}, seed {seed}: {len(ranks)} ranks for {task.num_pairs} pairs")


def _keyed(figures: Mapping[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in figures.items()}
