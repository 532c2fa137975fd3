"""Results as tables in the layout of the paper's Tables 1 to 4, printed as text, Markdown or HTML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STRATUM_NAMES = {
    "all": "All Pair",
    "short_query": "Short Query Pair",
    "short_target": "Short Target Pair",
    "long_query": "Long Query Pair",
    "long_target": "Long Target Pair",
}
PAPER_STRATA = ("all", "short_query", "short_target")  # Tables 2 to 4; Table 11 has the long ones
LONG_STRATA = ("long_query", "long_target")
SATURATED = "—"
NO_PAIRS = "n/a"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        columns: names over the cells.
        rows: each of ``len(columns)`` cells.
        groups: (title, number of columns) over the columns, or empty.
        num_labels: how many leading columns are words (aligned left).
        notes: lines below the table.
        strong: (row, column) of the cells that stand out, such as the best of a column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    num_labels: int = 1
    notes: Sequence[str] = ()
    strong: Collection[tuple[int, int]] = ()

    def __str__(self) -> str:
        """Aligned text."""
        widths = [max(map(_width, column)) for column in zip(self.columns, *self.rows, strict=True)]
        if self.groups:
            _widen(widths, self.groups)
        lines = [self._line(self.columns, widths), *(self._line(row, widths) for row in self.rows)]
        lines.insert(1, "-" * _width(lines[0]))
        if self.groups:
            lines.insert(0, self._group_line(widths))
        return "\n".join([line.rstrip() for line in lines] + list(self.notes))

    def markdown(self) -> str:
        """A Markdown table; user text in the cells cannot break out of it."""
        columns = list(self.columns)
        if self.groups:  # Markdown has one header row
            titles = [title for title, span in self.groups for _ in range(span)]
            columns = [f"{title}: {name}" if title else name for title, name in zip(titles, columns, strict=True)]
        lines = [list(map(escape_markdown, columns))]
        lines.append(["---" if at < self.num_labels else "---:" for at in range(len(columns))])
        for row, cells in enumerate(self.rows):
            escaped = map(escape_markdown, cells)
            lines.append([f"**{cell}**" if (row, at) in self.strong else cell for at, cell in enumerate(escaped)])
        text = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([*text, *("\n" + escape_markdown(note) for note in self.notes)])

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        parts = []
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            blank = " " * (width - _width(cell))
            parts.append(cell + blank if at < self.num_labels else blank + cell)
        return "  ".join(parts)

    def _group_line(self, widths: Sequence[int]) -> str:
        parts, at = [], 0
        for title, span in self.groups:
            width = sum(widths[at : at + span]) + 2 * (span - 1)
            parts.append(title + " " * (width - _width(title)) if not title else f"{title:-^{width}}")
            at += span
        return "  ".join(parts)


def recall_table(results: Mapping[str, Any], strata: Sequence[str] = PAPER_STRATA, *, inputs: bool = False) -> Table:
    """Recall in percent, mean ± deviation over seeds, in the layout of Tables 2 and 4 (or 3).

    Args:
        results: of :func:`notellm2_ray.evaluate.recall.results.evaluate`.
        strata: groups of columns.
        inputs: False: each method with its main inputs (Tables 2 and 4); True: the methods that were tested with
            several, with all of them (Table 3).
    """
    rows = [row for row in results["rows"] if row["main"]]
    if inputs:
        several = {row["method"] for row in results["rows"] if not row["main"]}
        rows = [row for row in results["rows"] if row["method"] in several]
    marks = _marks(results)
    cells = [[row["method"], row["inputs"], *_recall_cells(results, row, strata, marks)] for row in rows]
    names = [f"R@{_short(k)}" for k in _shown(results)]
    groups = [("", 2), *((f"{STRATUM_NAMES[s]} ({results['pairs'][s]:,})", len(names)) for s in strata)]
    columns, notes = ("Method", "Input", *names * len(strata)), _recall_notes(results, cells, marks)
    return Table(columns, cells, groups, 2, notes, _best(results, rows, strata))


def significance_table(results: Mapping[str, Any], role: str, strata: Sequence[str] = PAPER_STRATA) -> Table:
    """The tests behind the marks: one row per method, stratum and cutoff.

    Args:
        results: of :func:`notellm2_ray.evaluate.recall.results.evaluate`.
        role: "best baseline" or "reference".
        strata: those shown.
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
            _p(test["p_seeds"]),
            _p(test["p_queries"]),
            "yes" if test["significant"] else "no",
        ]
        for test in chosen
    ]
    kinds = sorted({test["seeds_test"] for test in chosen})
    notes = (
        "Difference in percentage points. p over seeds: two-sided t-test (" + "; ".join(kinds) + ").",
        "p over queries: two-sided exact sign test over query notes (McNemar's for one seed and one pair per query).",
        f"Significant: p < {results['level']} over seeds where that test exists, else over queries; not corrected for "
        "the number of comparisons.",
    )
    columns = ("Method", "Input", "Against", "Pairs", "k", "Difference", "p seeds", "p queries", "Significant")
    return Table(columns, rows, num_labels=4, notes=notes if rows else ())


def mrr_table(results: Mapping[str, Any], strata: Sequence[str] = PAPER_STRATA) -> Table:
    """Mean reciprocal rank, times 100, of every row."""
    cells = []
    for row in results["rows"]:
        cells.append([row["method"], row["inputs"], *(_figure(row["mrr"][s], "") for s in strata)])
    return Table(("Method", "Input", *(STRATUM_NAMES[s] for s in strata)), cells, num_labels=2)


def statistics_table(statistics: Mapping[str, Any]) -> Table:
    """Table 1: a column per part (training, testing), a row per figure; single figures stand in the first column."""
    parts = {name: value for name, value in statistics.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in statistics.items() if not isinstance(value, (Mapping, list))}
    names = list(dict.fromkeys(key for part in parts.values() for key in part))
    rows = [[_words(key), *(_number(part.get(key)) for part in parts.values())] for key in names]
    width = max(len(parts), 1)
    rows += [[_words(key), _number(value), *[""] * (width - 1)] for key, value in single.items()]
    return Table(("", *(map(_words, parts) if parts else ("value",))), rows)


def escape_markdown(text: str) -> str:
    """Text as Markdown shows it literally, on one line."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$])", r"\\\1", line)


def _recall_cells(
    results: Mapping[str, Any], row: Mapping[str, Any], strata: Sequence[str], marks: Mapping[tuple[Any, ...], str]
) -> list[str]:
    cells = []
    for stratum in strata:
        for k in _shown(results):
            mark = marks.get((row["method"], row["inputs"], stratum, k), "")
            cells.append(_figure(row["recall"][stratum][str(k)], mark))
    return cells


def _shown(results: Mapping[str, Any]) -> list[int]:
    """The cutoffs that tell methods apart; all of them if none does."""
    return [k for k in results["cutoffs"] if k not in results["saturated"]] or list(results["cutoffs"])


def _best(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], strata: Sequence[str]) -> set[tuple[int, int]]:
    """(row, column) of the highest recall of each column that tells methods apart."""
    best = set()
    keys = [(stratum, k) for stratum in strata for k in _shown(results)]
    for column, (stratum, k) in enumerate(keys, start=2):
        figures = [row["recall"][stratum][str(k)] for row in rows]
        if k not in results["saturated"] and any(figures):
            top = max(figure["mean"] for figure in figures)
            best |= {(row, column) for row, figure in enumerate(figures) if figure["mean"] == top}
    return best


def _marks(results: Mapping[str, Any]) -> dict[tuple[Any, ...], str]:
    return {
        (test["method"], test["inputs"], test["stratum"], test["cutoff"]): "*" if test["deciding"] == "seeds" else "†"
        for test in results["tests"]
        if test["role"] == "best baseline" and test["significant"] and test["difference"] > 0
    }


def _recall_notes(
    results: Mapping[str, Any], cells: Sequence[Sequence[str]], marks: Mapping[tuple[Any, ...], str]
) -> list[str]:
    text = " ".join(cell for row in cells for cell in row[2:])
    telling = [k for k in results["cutoffs"] if k not in results["saturated"]]
    chance = ", ".join(f"R@{_short(k)} {100 * results['chance'][str(k)]:.2f}" for k in telling) or "100"
    notes = [
        f"Recall in %, over a pool of {results['pool_notes']:,} notes, the query left out, ties counted against the "
        f"method; pairs in parentheses. Expected by chance: {chance}."
    ]
    if "±" in text:
        notes.append("±: standard deviation over seeds.")
    if "*" in text:
        notes.append(f"*: above the best baseline of the column, two-sided t-test over seeds, p < {results['level']}.")
    if "†" in text:
        notes.append(
            f"†: above the best baseline of the column, sign test over query notes, p < {results['level']} "
            "(too few seeds for a t-test)."
        )
    if results["saturated"]:
        names = ", ".join(f"R@{_short(k)}" for k in results["saturated"])
        notes.append(f"{names}: 100 for any method, as k covers the whole pool.")
    if NO_PAIRS in text:
        notes.append(f"{NO_PAIRS}: there is no such pair.")
    return notes


def _figure(figure: Mapping[str, Any] | None, mark: str) -> str:
    if figure is None:
        return NO_PAIRS
    deviation = "" if figure["deviation"] is None else f" ±{100 * figure['deviation']:.2f}"
    return f"{100 * figure['mean']:.2f}{deviation}{mark}"


def _p(value: float | None) -> str:
    return SATURATED if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _short(k: int) -> str:
    return f"{k // 1000}k" if k >= 1000 and k % 1000 == 0 else str(k)


def _words(key: Any) -> str:
    return str(key).removeprefix("num_").replace("_", " ")


def _number(value: Any) -> str:
    if value is None:
        return SATURATED
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _widen(widths: list[int], groups: Sequence[tuple[str, int]]) -> None:
    at = 0
    for title, span in groups:
        lacking = _width(title) - sum(widths[at : at + span]) - 2 * (span - 1)
        if lacking > 0:
            widths[at + span - 1] += lacking
        at += span
