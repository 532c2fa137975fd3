"""Recall results as tables, in the layout of the paper's Tables 2 to 4."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from notellm2_ray.evaluate.comparisons import mark_notes, marks, seeds_note
from notellm2_ray.evaluate.recall.task import TABLES
from notellm2_ray.evaluate.tables import NO_DATA, Table, p_value, percent

STRATUM_NAMES = {
    "all": "All Pair",
    "short_query": "Short Query Pair",
    "short_target": "Short Target Pair",
    "long_query": "Long Query Pair",
    "long_target": "Long Target Pair",
    "warm_query": "Warm Query Pair",
    "cold_query": "Cold Query Pair",
    "warm_target": "Warm Target Pair",
    "cold_target": "Cold Target Pair",
}
PAPER_STRATA, LONG_STRATA, WARMTH_STRATA = TABLES.values()
COLD_NOTE = "A note is cold if no click on it is in the log that the training pairs were mined from."


def recall_table(results: Mapping[str, Any], strata: Sequence[str] = PAPER_STRATA, *, inputs: bool = False) -> Table:
    """Recall in percent, mean ± deviation over seeds, in the layout of Tables 2 and 4 (or 3).

    Args:
        results: of :func:`notellm2_ray.evaluate.recall.results.evaluate`.
        strata: groups of columns.
        inputs: False: each method with its main inputs (Tables 2 and 4). True: each method that was tested with several
            inputs, with all of them (Table 3). Its rows are not tested.
    """
    rows = [row for row in results["rows"] if row["main"]]
    if inputs:
        several = {row["method"] for row in results["rows"] if not row["main"]}
        rows = [row for row in results["rows"] if row["method"] in several]
    tests = [] if inputs else [test for test in results["tests"] if test["stratum"] in strata]
    marked = marks(tests, lambda test: (test["method"], test["stratum"], test["cutoff"]))
    cells = [[row["method"], row["inputs"], *_recall_cells(results, row, strata, marked)] for row in rows]
    names = [f"R@{_short(k)}" for k in _shown(results)]
    groups = [("", 2), *((f"{STRATUM_NAMES[s]} ({results['pairs'][s]:,})", len(names)) for s in strata)]
    columns = ("Method", "Input", *names * len(strata))
    remarks = [f"{row['method']}: {row['remark']}" for row in rows if row["remark"]]
    notes = [*_recall_notes(results, cells), *remarks, *mark_notes(str(cells), tests, "query notes")]
    return Table(columns, cells, groups, 2, notes, _best(results, rows, strata))


def warmth_table(results: Mapping[str, Any]) -> Table | None:
    """Recall for warm and cold queries and targets; None if all are cold, as in a split by new notes."""
    if not any(results["pairs"][name] for name in ("warm_query", "warm_target")):
        return None
    shown = [name for name in WARMTH_STRATA if results["pairs"][name]]
    table = recall_table(results, shown)
    return replace(table, notes=[*table.notes, COLD_NOTE])


def significance_table(results: Mapping[str, Any], role: str, strata: Sequence[str] = PAPER_STRATA) -> Table:
    """The tests of significance: one row per method, stratum and cutoff.

    Args:
        results: of :func:`notellm2_ray.evaluate.recall.results.evaluate`.
        role: "best other", "best baseline" or "reference".
        strata: the strata shown.
    """
    chosen = [test for test in results["tests"] if test["role"] == role and test["stratum"] in strata]
    rows = [
        [
            test["method"],
            test["inputs"],
            f"{test['against']} ({test['against_inputs']})",
            STRATUM_NAMES[test["stratum"]],
            f"R@{_short(test['cutoff'])}",
            f"{100 * test['difference']:+.2f}",
            p_value(test["p_seeds"]),
            p_value(test["p_units"]),
            p_value(test["p_holm"]),
            "yes" if test["significant"] else "no",
        ]
        for test in chosen
    ]
    notes = seeds_note(chosen, "p queries: two-sided paired permutation test over query notes.")
    columns = (
        "Method",
        "Input",
        "Against",
        "Pairs",
        "k",
        "Difference",
        "p seeds",
        "p queries",
        "p Holm",
        "Significant",
    )
    return Table(columns, rows, num_labels=4, notes=notes if rows else ())


def lead(results: Mapping[str, Any]) -> str:
    """The size of the task, in one line."""
    return f"{results['pairs']['all']:,} test pairs over a pool of {results['pool_notes']:,} notes."


def printed(results: Mapping[str, Any]) -> str:
    """The recall tables as text."""
    tables = (recall_table(results), warmth_table(results), recall_table(results, inputs=True))
    return "\n\n".join(str(table) for table in tables if table is not None) + "\n"


def mrr_table(results: Mapping[str, Any], strata: Sequence[str] = PAPER_STRATA) -> Table:
    """Mean reciprocal rank, times 100, of every row."""
    cells = []
    for row in results["rows"]:
        cells.append([row["method"], row["inputs"], *(percent(row["mrr"][s]) for s in strata)])
    return Table(("Method", "Input", *(STRATUM_NAMES[s] for s in strata)), cells, num_labels=2)


def _recall_cells(
    results: Mapping[str, Any], row: Mapping[str, Any], strata: Sequence[str], marked: Mapping[Hashable, str]
) -> list[str]:
    cells = []
    for stratum in strata:
        for k in _shown(results):
            mark = marked.get((row["method"], stratum, k), "")
            cells.append(percent(row["recall"][stratum][str(k)]) + mark)
    return cells


def _telling(results: Mapping[str, Any]) -> list[int]:
    """The cutoffs at which methods can differ."""
    return [k for k in results["cutoffs"] if k not in results["saturated"]]


def _shown(results: Mapping[str, Any]) -> list[int]:
    """The cutoffs at which methods can differ, or all cutoffs if there are none."""
    return _telling(results) or list(results["cutoffs"])


def _best(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], strata: Sequence[str]) -> set[tuple[int, int]]:
    """(row, column) of the highest recall of each column in which methods can differ."""
    best = set()
    keys = [(stratum, k) for stratum in strata for k in _shown(results)]
    for column, (stratum, k) in enumerate(keys, start=2):
        figures = [row["recall"][stratum][str(k)] for row in rows]
        if k not in results["saturated"] and any(figures):
            top = max(figure["mean"] for figure in figures)
            best |= {(row, column) for row, figure in enumerate(figures) if figure["mean"] == top}
    return best


def _recall_notes(results: Mapping[str, Any], cells: Sequence[Sequence[str]]) -> list[str]:
    text = " ".join(cell for row in cells for cell in row[2:])
    figures = [f"R@{_short(k)} {100 * results['chance'][str(k)]:.2f}" for k in _telling(results)]
    chance = ", ".join(figures) or "100"
    notes = [
        f"Recall in %, over a pool of {results['pool_notes']:,} notes, the query left out, ties counted against the "
        f"method; pairs in parentheses. Expected by chance: {chance}."
    ]
    if "±" in text:
        notes.append("±: standard deviation over seeds.")
    if results["saturated"]:
        names = ", ".join(f"R@{_short(k)}" for k in results["saturated"])
        notes.append(f"{names}: 100 for any method, as k covers the whole pool.")
    if not (results["pairs"]["warm_query"] or results["pairs"]["warm_target"]):
        notes.append(
            "All queries and targets are cold: no click on them is in the training log, so collaborative filtering "
            "knows nothing of them (see split.test_notes)."
        )
    if NO_DATA in text:
        notes.append(f"{NO_DATA}: there is no such pair.")
    return notes


def _short(k: int) -> str:
    return f"{k // 1000}k" if k >= 1000 and k % 1000 == 0 else str(k)
