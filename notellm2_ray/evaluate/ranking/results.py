"""Compares rankers on one protocol's candidates; tables and report are made from the results.

Used as::

    task = RankingTask.build("uniform", candidates, examples, clicks)
    methods = [MethodScores("mllm_msr", "ranker", {42: task.align(table, "scores of mllm_msr")}), ...]
    results = evaluate_protocol(task, methods, settings.ranking, seed)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.evaluate.ranking.metrics import PooledAuc, example_figures
from notellm2_ray.evaluate.ranking.task import STRATA, RankingTask
from notellm2_ray.evaluate.statistics import (
    LEVEL,
    bootstrap_p,
    interval,
    mean_and_deviation,
    permutation_tests,
    resampled_weights,
    seeds_test,
)

Kind = Literal["baseline", "untuned", "ranker", "control"]


@dataclass(frozen=True)
class MethodScores:
    """A method's scores of a task's candidates.

    Attributes:
        method: its name in the tables.
        kind: "ranker" for a tuned ranker. The first one is the main ranker, which is compared with the others and with
            its controls.
        scores: training seed to (R,) scores; a deterministic method has the one seed None.
    """

    method: str
    kind: Kind
    scores: Mapping[int | None, np.ndarray]

    @property
    def fixed(self) -> bool:
        return set(self.scores) == {None}


class _Measured(NamedTuple):
    """A method's figures on one stratum of E examples, for S seeds and B resamples."""

    per_seed: dict[str, list[float]]  # figure to (S,)
    per_example: dict[str, np.ndarray]  # figure, without auc, to (E,), mean over seeds
    resampled: dict[str, np.ndarray]  # figure to (B,)


def evaluate_protocol(
    task: RankingTask,
    methods: Sequence[MethodScores],
    settings: RankEvaluateSettings,
    seed: int,
    *,
    references: Sequence[str] = (),
    untested: Collection[str] = (),
) -> dict[str, Any]:
    """Every figure of every method with its interval over users, and the tests between methods, as JSON values.

    Args:
        task: the candidates.
        methods: in the order of the tables.
        settings: cutoffs and level of the intervals.
        seed: of the resamples and permutations.
        references: methods that every other method is tested against, in the order of the tests; those that are not
            among ``methods`` are ignored.
        untested: methods that are not tested against the references.

    Returns:
        ``protocol``, ``examples`` and ``users`` (per stratum), ``candidates`` (fewest and most of an example),
        ``cutoffs``, ``confidence``, ``level``; ``rows``: method, kind, seeds, ``figures[stratum][figure] = {mean,
        deviation, low, high, seeds}`` (None if the stratum is empty); ``tests``: method, against, role
        ("reference", "ablation" or "control"), stratum, figure, difference, p_seeds, seeds_test, p_users (paired
        over users: a bootstrap for ``auc``, permutations for the other figures), significant. Shares are from 0 to 1.

    Raises:
        DataError: a method is given twice, or the number of scores is not that of the candidates.
    """
    _check(task, methods)
    rows: list[dict[str, Any]] = [
        {"method": one.method, "kind": one.kind, "seeds": [s for s in one.scores if s is not None], "figures": {}}
        for one in methods
    ]
    tests: list[dict[str, Any]] = []
    matches = _matches(methods, references, untested)
    for stratum in STRATA:
        measured = _measure(task, methods, task.mask(stratum), settings, seed)
        for row, one in zip(rows, measured, strict=True):
            row["figures"][stratum] = one and _figures(one, row["seeds"], settings.confidence)
        tests += _tests(task, methods, matches, measured, stratum, seed)
    sizes = np.bincount(task.groups)
    return {
        "protocol": task.protocol,
        "examples": {name: int(task.mask(name).sum()) for name in STRATA},
        "users": {name: len(np.unique(task.user_groups[task.mask(name)])) for name in STRATA},
        "candidates": [int(sizes.min()), int(sizes.max())],
        "cutoffs": list(settings.cutoffs),
        "confidence": settings.confidence,
        "level": LEVEL,
        "rows": rows,
        "tests": tests,
    }


def _measure(
    task: RankingTask, methods: Sequence[MethodScores], mask: np.ndarray, settings: RankEvaluateSettings, seed: int
) -> list[_Measured | None]:
    if not mask.any():
        return [None] * len(methods)
    rows, groups, users = task.subset(mask)
    weights = resampled_weights(users, seed)  # (B, E)
    return [_measure_one(one, rows, groups, task.labels[rows], weights, settings.cutoffs) for one in methods]


def _measure_one(
    method: MethodScores,
    rows: np.ndarray,
    groups: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    cutoffs: Sequence[int],
) -> _Measured:
    runs = [example_figures(groups, labels, s[rows], weights.shape[1], cutoffs) for s in method.scores.values()]
    areas = [PooledAuc(groups, labels, s[rows]) for s in method.scores.values()]
    per_example = {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}
    per_seed = {"auc": [area() for area in areas]}
    per_seed |= {name: [float(run[name].mean()) for run in runs] for name in runs[0]}
    resampled = {"auc": np.array([np.mean([area(one) for area in areas]) for one in weights])}
    resampled |= {name: weights @ values / weights.sum(axis=1) for name, values in per_example.items()}
    return _Measured(per_seed, per_example, resampled)


def _figures(measured: _Measured, seeds: Sequence[int], confidence: float) -> dict[str, dict[str, Any]]:
    found = {}
    for name, values in measured.per_seed.items():
        mean, deviation = mean_and_deviation(values)
        low, high = interval(measured.resampled[name], confidence) or (None, None)
        by_seed = {str(seed): value for seed, value in zip(seeds, values, strict=True)} if seeds else {}
        found[name] = {"mean": mean, "deviation": deviation, "low": low, "high": high, "seeds": by_seed}
    return found


def _tests(
    task: RankingTask,
    methods: Sequence[MethodScores],
    matches: Sequence[tuple[int, int, str]],
    measured: Sequence[_Measured | None],
    stratum: str,
    seed: int,
) -> list[dict[str, Any]]:
    pairs = [(mine, theirs) for one, other, _ in matches if (mine := measured[one]) and (theirs := measured[other])]
    if not pairs:
        return []
    summed = list(pairs[0][0].per_example)  # every figure but auc, which is not a sum over users
    gains = [mine.per_example[name] - theirs.per_example[name] for mine, theirs in pairs for name in summed]
    users = task.user_groups[task.mask(stratum)]
    permuted = permutation_tests(np.stack(gains, axis=1), users, seed).reshape(len(pairs), len(summed))
    found = []
    for (one, other, role), (mine, theirs), row in zip(matches, pairs, permuted, strict=True):
        areas = bootstrap_p(mine.resampled["auc"] - theirs.resampled["auc"])
        p_users: dict[str, float | None] = {"auc": areas, **dict(zip(summed, row.tolist(), strict=True))}
        names = {"method": methods[one].method, "against": methods[other].method, "role": role, "stratum": stratum}
        for figure, p in p_users.items():
            values, others = mine.per_seed[figure], theirs.per_seed[figure]
            by_seeds = seeds_test(values, others, fixed=methods[one].fixed, other_fixed=methods[other].fixed)
            found.append({**names, "figure": figure, **_verdict(values, others, by_seeds, p)})
    return found


def _verdict(
    values: Sequence[float], others: Sequence[float], by_seeds: tuple[float | None, str], p_users: float | None
) -> dict[str, Any]:
    """Significant only if each test that exists rejects "no difference": over users, and over seeds."""
    p_seeds, seeds_name = by_seeds
    return {
        "difference": float(np.mean(values) - np.mean(others)),
        "p_seeds": p_seeds,
        "seeds_test": seeds_name,
        "p_users": p_users,
        "significant": p_users is not None and p_users < LEVEL and (p_seeds is None or p_seeds < LEVEL),
    }


def _matches(
    methods: Sequence[MethodScores], references: Sequence[str], untested: Collection[str]
) -> list[tuple[int, int, str]]:
    """Which methods are compared: every one with the references, the main ranker also with its variants."""
    place = {method.method: at for at, method in enumerate(methods)}
    present = [place[name] for name in references if name in place]
    main = next((at for at, method in enumerate(methods) if method.kind == "ranker"), None)
    matches = [
        (at, reference, "reference")
        for at, method in enumerate(methods)
        for reference in present
        if at != reference and method.method not in untested and not (at in present and at < reference)
    ]
    if main is not None:
        roles = {"ranker": "ablation", "control": "control"}
        matches += [
            (main, at, roles[method.kind]) for at, method in enumerate(methods) if at != main and method.kind in roles
        ]
    return matches


def _check(task: RankingTask, methods: Sequence[MethodScores]) -> None:
    names = [method.method for method in methods]
    if len(set(names)) != len(names):
        raise DataError(f"a method is given twice among {names}")
    for method in methods:
        for seed, scores in method.scores.items():
            if len(scores) != len(task.groups):
                raise DataError(
                    f"{method.method}, seed {seed}: {len(scores)} scores for {len(task.groups)} candidates of "
                    f"{task.protocol}"
                )
