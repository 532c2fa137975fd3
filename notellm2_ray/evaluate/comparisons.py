"""Which rows of a table are tested against which, and what its marks mean: the same for recall and for ranking.

- † marks a row above the best other row of its column, whatever that is.
- * marks a method above the best baseline of its column, trained baselines included: the papers' star.

A difference counts if it is there over units (query notes in recall, users in ranking) and, where both rows have seeds
enough for a test, over seeds too. So the larger of the two p-values is the p of a comparison: it claims that neither
other queries or users nor other seeds would turn it. It is then corrected by Holm for the comparisons of its table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from notellm2_ray.evaluate.statistics import LEVEL, seeds_test

MarkRole = Literal["best other", "best baseline"]
MARKS: Mapping[str, str] = {"best other": "†", "best baseline": "*"}
_MEANINGS = {
    "†": "†: above the best other row of the column.",
    "*": "*: above the best baseline of the column, trained ones included.",
}


def contests(means: Sequence[float], is_baseline: Sequence[bool]) -> list[tuple[int, int, MarkRole]]:
    """The comparisons that decide a column's marks: (row, other row, role).

    The best row is compared with the second, and each row that is no baseline with the best baseline.
    """
    order = sorted(range(len(means)), key=lambda at: -means[at])
    found: list[tuple[int, int, MarkRole]] = [(order[0], order[1], "best other")] if len(order) > 1 else []
    best = next((at for at in order if is_baseline[at]), None)
    if best is not None:
        found += [(at, best, "best baseline") for at in range(len(means)) if not is_baseline[at]]
    return found


def verdict(
    values: Sequence[float] | np.ndarray,
    others: Sequence[float] | np.ndarray,
    p_units: float | None,
    *,
    fixed: bool,
    other_fixed: bool,
) -> dict[str, Any]:
    """A comparison of two rows as JSON values: ``difference``, ``p_seeds``, ``seeds_test``, ``p_units`` and ``p``.

    Args:
        values: the row's figure, one per seed.
        others: the other row's.
        p_units: p-value over users or query notes.
        fixed, other_fixed: whether the row is deterministic.
    """
    p_seeds, name = seeds_test(values, others, fixed=fixed, other_fixed=other_fixed)
    p = p_units if p_units is None or p_seeds is None else max(p_units, p_seeds)
    difference = float(np.mean(values) - np.mean(others))
    return {"difference": difference, "p_seeds": p_seeds, "seeds_test": name, "p_units": p_units, "p": p}


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down correction: below 5%, all of them together are falsely called so in at most 5% of the cases.

    The smallest of m values is multiplied by m, the next by m - 1 and so on; a value is never below a smaller one's.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected


def correct(tests: Sequence[dict[str, Any]], family: Callable[[Mapping[str, Any]], Hashable]) -> None:
    """Add ``p_holm`` and ``significant`` to each comparison; those of one family are corrected together."""
    families: dict[Hashable, list[dict[str, Any]]] = {}
    for test in tests:
        test |= {"p_holm": None, "significant": False}
        if test["p"] is not None:
            families.setdefault(family(test), []).append(test)
    for members in families.values():
        for test, p in zip(members, holm([test["p"] for test in members]).tolist(), strict=True):
            test |= {"p_holm": p, "significant": p < LEVEL}


def marks(tests: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], Hashable]) -> dict[Hashable, str]:
    """The marks of each cell; ``cell`` names the cell of a comparison's row."""
    found: dict[Hashable, str] = {}
    for test in tests:
        if test["role"] in MARKS and test["significant"] and test["difference"] > 0:
            found[cell(test)] = found.get(cell(test), "") + MARKS[test["role"]]
    return found


def mark_notes(cells: str, tests: Sequence[Mapping[str, Any]], units: str) -> list[str]:
    """The lines below a table that say what its marks mean, or that nothing is marked.

    Args:
        cells: all text of the table.
        tests: the comparisons of this table.
        units: what is tested over besides seeds, as in "users".
    """
    if not (deciding := [test for test in tests if test["role"] in MARKS]):
        return []
    over = f"over {units} alone, as there are too few seeds to test over"
    if any(test["p_seeds"] is not None for test in deciding):
        over = f"over {units} and, where rows have several seeds, over seeds too"
    how = f"p < {LEVEL} {over}; corrected by Holm for all comparisons of the table"
    shown = [meaning for mark, meaning in _MEANINGS.items() if mark in cells]
    if shown:
        return [" ".join([*shown, f"Two-sided {how}."])]
    return [f"No row is above the best other row or the best baseline of its column at {how}."]


def seeds_note(tests: Sequence[Mapping[str, Any]], unit_test: str) -> list[str]:
    """The lines below a table of comparisons that say how its p-values were made."""
    kinds = "; ".join(sorted({test["seeds_test"] for test in tests}))
    return [
        f"Difference in percentage points. p seeds: two-sided t-test over seeds ({kinds}). {unit_test}",
        "p Holm: the larger of the two, corrected for all comparisons of the same kind in the table. Significant: "
        f"p Holm < {LEVEL}.",
    ]
