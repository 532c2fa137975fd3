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
from typing import Any, Literal

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.evaluate.comparisons import contests, correct, verdict
from notellm2_ray.evaluate.recall import metrics
from notellm2_ray.evaluate.recall.task import TABLES, RetrievalTask
from notellm2_ray.evaluate.statistics import LEVEL, mean_and_deviation, permutation_tests

CURVE_STRATA = ("all", "short_query")
CURVE_POINTS = 40

# baseline: a row that is not an embedder; trained_baseline: an embedder that the method is compared with, such as one
# of the text alone.
Kind = Literal["baseline", "trained_baseline", "embedder"]


@dataclass(frozen=True)
class MethodRanks:
    """A method's ranks on the pairs of a task.

    Attributes:
        method: its name in the tables.
        inputs: what it was tested with: "multimodal", "image", "text" or "-". A method may be given several times with
            different inputs, its main ones first.
        ranks: training seed to (Q,) ranks; a deterministic method has the one seed None.
        remark: what a reader must know of it; printed below the table.
        kind: whether it is a baseline; the star compares embedders with the best of both kinds of baselines.
    """

    method: str
    inputs: str
    ranks: Mapping[int | None, np.ndarray]
    kind: Kind = "embedder"
    remark: str = ""

    @property
    def fixed(self) -> bool:
        return set(self.ranks) == {None}

    def hits(self, k: int, mask: np.ndarray) -> np.ndarray:
        """(S, M) bool: for each seed and pair of the stratum, whether the target is among the first k."""
        return np.stack([ranks[mask] <= k for ranks in self.ranks.values()])


def evaluate(
    task: RetrievalTask, rankings: Sequence[MethodRanks], reference: str | None = None, *, seed: int = 42
) -> dict[str, Any]:
    """Recall of every method, and the tests between methods, as JSON values.

    Args:
        task: the pairs.
        rankings: the methods' ranks, in the order of the tables.
        reference: a method, such as "basic", that all others are tested against as well, with its main inputs.
        seed: of the permutations.

    Returns:
        ``pool_notes``, ``pairs`` (per stratum), ``cutoffs``, ``saturated``, ``chance`` (per cutoff) and
        ``rows``: method, inputs, kind, remark, main, seeds, ``recall[stratum][cutoff] = {mean, deviation, seeds}``,
        ``mrr[stratum]``, ``curve[stratum] = {k, recall}``;
        ``tests``, among rows with their main inputs: method, inputs, against, against_inputs, role ("best other", "best
        baseline" or "reference"), stratum, cutoff, difference, p_seeds, seeds_test, p_units (over query notes, by
        permutation), p (the larger of the two), p_holm, significant: see :mod:`notellm2_ray.evaluate.comparisons`.
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
        "tests": _tests(task, rankings, rows, reference, seed),
    }


def _row(task: RetrievalTask, ranking: MethodRanks, main: bool) -> dict[str, Any]:
    return {
        "method": ranking.method,
        "inputs": ranking.inputs,
        "kind": ranking.kind,
        "remark": ranking.remark,
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
    task: RetrievalTask,
    rankings: Sequence[MethodRanks],
    rows: Sequence[dict[str, Any]],
    reference: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    found = [
        test
        for stratum, mask in task.strata.items()
        if mask.any()
        for test in _tests_of(task, rankings, rows, stratum, reference, seed)
    ]
    table_of = {stratum: table for table, strata in TABLES.items() for stratum in strata}
    correct(found, lambda test: (test["role"], table_of[test["stratum"]]))
    return found


def _tests_of(
    task: RetrievalTask,
    rankings: Sequence[MethodRanks],
    rows: Sequence[dict[str, Any]],
    stratum: str,
    reference: str | None,
    seed: int,
) -> list[dict[str, Any]]:
    """The comparisons of a stratum's columns, among the rows with their main inputs."""
    mask = task.strata[stratum]
    main = [at for at, row in enumerate(rows) if row["main"]]
    baseline = [rankings[at].kind != "embedder" for at in main]
    anchor = next((at for at in main if rankings[at].method == reference), None)
    matches: list[tuple[int, int, str, int]] = []
    for k in (k for k in task.cutoffs if k not in task.saturated):
        means = [rows[at]["recall"][stratum][str(k)]["mean"] for at in main]
        matches += [(main[one], main[other], role, k) for one, other, role in contests(means, baseline)]
        if anchor is not None:
            matches += [(at, anchor, "reference", k) for at in main if at != anchor]
    if not matches:
        return []
    gains = [_gain(rankings[one], rankings[other], k, mask) for one, other, _, k in matches]
    groups = np.unique(task.query_ids[mask].astype(str), return_inverse=True)[1]
    p_queries = permutation_tests(np.stack(gains, axis=1), groups, seed).tolist()
    return [
        {"method": rows[one]["method"], "inputs": rows[one]["inputs"], "against": rows[other]["method"]}
        | {"against_inputs": rows[other]["inputs"], "role": role, "stratum": stratum, "cutoff": k}
        | verdict(
            rankings[one].hits(k, mask).mean(axis=1),
            rankings[other].hits(k, mask).mean(axis=1),
            p,
            fixed=rankings[one].fixed,
            other_fixed=rankings[other].fixed,
        )
        for (one, other, role, k), p in zip(matches, p_queries, strict=True)
    ]


def _gain(ranking: MethodRanks, other: MethodRanks, k: int, mask: np.ndarray) -> np.ndarray:
    """(M,) how much more often, over seeds, each pair of the stratum is found."""
    return ranking.hits(k, mask).mean(axis=0) - other.hits(k, mask).mean(axis=0)


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
