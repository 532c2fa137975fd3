"""Compares rankers on one protocol's candidates; tables and report are made from the results.

Used as::

    task = RankingTask.build("uniform", candidates, examples, clicks)
    methods = [MethodScores("mllm_msr", "ranker", {42: task.align(table, "scores of mllm_msr")}), ...]
    results = evaluate_protocol(task, methods, settings.ranking, seed)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import RankEvaluateSettings
from notellm2_ray.evaluate.comparisons import contests, correct, verdict
from notellm2_ray.evaluate.ranking.metrics import PooledAuc, example_figures, main_figures, normalised
from notellm2_ray.evaluate.ranking.task import STRATA, RankingTask
from notellm2_ray.evaluate.statistics import (
    LEVEL,
    interval,
    mean_and_deviation,
    normal_p,
    permutation_tests,
    resampled_weights,
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
    per_example: dict[str, np.ndarray]  # figure, without the pooled areas, to (E,), mean over seeds
    resampled: dict[str, np.ndarray]  # figure to (B,)


class _Match(NamedTuple):
    """A comparison of two of the methods, by their places, on one figure."""

    method: int
    other: int
    role: str
    figure: str


def evaluate_protocol(
    task: RankingTask,
    methods: Sequence[MethodScores],
    settings: RankEvaluateSettings,
    seed: int,
    *,
    drawn: Mapping[int | None, RankingTask] | None = None,
) -> dict[str, Any]:
    """Every figure of every method with its interval over users, and the tests between methods, as JSON values.

    Args:
        task: the candidates.
        methods: in the order of the tables.
        settings: cutoffs and level of the intervals.
        seed: of the resamples and permutations.
        drawn: the candidates of seeds whose negatives were drawn apart, of the same examples; all other seeds have
            those of ``task``.

    Returns:
        ``protocol``, ``examples`` and ``users`` (per stratum), ``candidates`` (fewest and most of an example),
        ``cutoffs``, ``confidence``, ``level``; ``rows``: method, kind, seeds, ``figures[stratum][figure] = {mean,
        deviation, low, high, seeds}`` (None if the stratum is empty); ``tests``: method, against, role
        ("best other", "best baseline", "baseline", "ablation" or "control"), stratum, figure, difference, p_seeds,
        seeds_test, p_units (paired over users: a bootstrap for the two pooled areas, permutations for the other
        figures), p (the larger of the two), p_holm, significant: see :mod:`notellm2_ray.evaluate.comparisons`. The main
        figures of a stratum are corrected together, and so are its other figures. Shares are from 0 to 1.

    Raises:
        DataError: a method is given twice, the number of scores is not that of the candidates, or the candidates of a
            seed are not of the same examples.
    """
    drawn = drawn or {}
    _check(task, methods, drawn)
    rows: list[dict[str, Any]] = [
        {"method": one.method, "kind": one.kind, "seeds": [s for s in one.scores if s is not None], "figures": {}}
        for one in methods
    ]
    tests: list[dict[str, Any]] = []
    for stratum in STRATA:
        measured = _measure(task, methods, task.mask(stratum), settings, seed, drawn)
        for row, one in zip(rows, measured, strict=True):
            row["figures"][stratum] = one and _figures(one, row["seeds"], settings.confidence)
        tests += _tests(task, methods, measured, stratum, seed)
    main = main_figures(settings.cutoffs)
    correct(tests, lambda test: (test["role"], test["stratum"], test["figure"] in main))
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
    task: RankingTask,
    methods: Sequence[MethodScores],
    mask: np.ndarray,
    settings: RankEvaluateSettings,
    seed: int,
    drawn: Mapping[int | None, RankingTask],
) -> list[_Measured | None]:
    if not mask.any():
        return [None] * len(methods)
    rows, groups, users = task.subset(mask)
    weights = resampled_weights(users, seed)  # (B, E)
    labels = {each: drawn[each].labels if each in drawn else task.labels for one in methods for each in one.scores}
    return [
        _measure_one(
            [(labels[each][rows], scores[rows]) for each, scores in one.scores.items()],
            groups,
            weights,
            settings.cutoffs,
        )
        for one in methods
    ]


def _measure_one(
    scored: Sequence[tuple[np.ndarray, np.ndarray]],
    groups: np.ndarray,
    weights: np.ndarray,
    cutoffs: Sequence[int],
) -> _Measured:
    """The figures of one method from the labels and the scores of each seed."""
    num_examples = weights.shape[1]
    runs = [example_figures(groups, labels, scores, num_examples, cutoffs) for labels, scores in scored]
    areas = {
        "auc": [PooledAuc(groups, labels, scores) for labels, scores in scored],
        "auc_norm": [PooledAuc(groups, labels, normalised(groups, scores, num_examples)) for labels, scores in scored],
    }
    per_example = {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}
    per_seed = {name: [area() for area in found] for name, found in areas.items()}
    per_seed |= {name: [float(run[name].mean()) for run in runs] for name in runs[0]}
    resampled = {
        name: np.array([np.mean([area(one) for area in found]) for one in weights]) for name, found in areas.items()
    }
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
    measured: Sequence[_Measured | None],
    stratum: str,
    seed: int,
) -> list[dict[str, Any]]:
    known = [one for one in measured if one is not None]
    if not known:
        return []
    matches = [match for figure in known[0].per_seed for match in _matches(methods, known, figure)]
    p_users = _p_users(matches, known, task.user_groups[task.mask(stratum)], seed)
    return [
        {"method": methods[one].method, "against": methods[other].method, "role": role, "stratum": stratum}
        | {"figure": figure}
        | verdict(
            known[one].per_seed[figure],
            known[other].per_seed[figure],
            p,
            fixed=methods[one].fixed,
            other_fixed=methods[other].fixed,
        )
        for (one, other, role, figure), p in zip(matches, p_users, strict=True)
    ]


def _p_users(
    matches: Sequence[_Match], measured: Sequence[_Measured], users: np.ndarray, seed: int
) -> list[float | None]:
    """p-values over users: of a permutation test, or for a pooled AUC, which is no sum over users, of a bootstrap."""
    summed = [at for at, match in enumerate(matches) if match.figure in measured[0].per_example]
    found: list[float | None] = [None] * len(matches)
    if summed:
        gains = [
            measured[one].per_example[figure] - measured[other].per_example[figure]
            for one, other, _, figure in (matches[at] for at in summed)
        ]
        for at, p in zip(summed, permutation_tests(np.stack(gains, axis=1), users, seed).tolist(), strict=True):
            found[at] = p
    num_users = len(np.unique(users))
    for at in set(range(len(matches))) - set(summed):
        one, other, _, figure = matches[at]
        difference = np.mean(measured[one].per_seed[figure]) - np.mean(measured[other].per_seed[figure])
        resampled = measured[one].resampled[figure] - measured[other].resampled[figure]
        found[at] = normal_p(float(difference), resampled, num_users)
    return found


def _matches(methods: Sequence[MethodScores], measured: Sequence[_Measured], figure: str) -> list[_Match]:
    """The comparisons that marks need, those of rankers with every baseline, and of the main ranker with the rest."""
    means = [float(np.mean(one.per_seed[figure])) for one in measured]
    baseline = [method.kind in ("baseline", "untuned") for method in methods]
    matches = [_Match(one, other, role, figure) for one, other, role in contests(means, baseline)]
    rankers = [at for at, method in enumerate(methods) if method.kind == "ranker"]
    matches += [_Match(at, other, "baseline", figure) for at in rankers for other in np.flatnonzero(baseline).tolist()]
    roles = {"ranker": "ablation", "control": "control"}
    for main in rankers[:1]:
        matches += [
            _Match(main, at, roles[method.kind], figure)
            for at, method in enumerate(methods)
            if at != main and method.kind in roles
        ]
    return matches


def _check(task: RankingTask, methods: Sequence[MethodScores], drawn: Mapping[int | None, RankingTask]) -> None:
    for drawn_for, other in drawn.items():
        if not (np.array_equal(other.groups, task.groups) and np.array_equal(other.example_ids, task.example_ids)):
            raise DataError(f"{task.protocol}: seed {drawn_for} has candidates of other examples: run make-sequences")
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
