"""Tables of text cells, printed as aligned text, Markdown or HTML, and the cells that both reports share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "—"
NO_DATA = "n/a"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        columns: headers of the columns.
        rows: each of ``len(columns)`` cells.
        groups: (title, number of columns) of a second header above the columns, or empty.
        num_labels: how many of the first columns are words, aligned left.
        notes: lines below the table.
        strong: (row, column) of the cells to print bold, such as the best of a column.
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


def percent(figure: Mapping[str, Any] | None) -> str:
    """A figure (``mean``, ``deviation``) in percent, with its deviation over seeds; None: there was no data for it."""
    if figure is None:
        return NO_DATA
    deviation = "" if figure["deviation"] is None else f" ±{100 * figure['deviation']:.2f}"
    return f"{100 * figure['mean']:.2f}{deviation}"


def p_value(value: float | None) -> str:
    """A p-value as printed; None: there is no such test."""
    return NOT_MEASURED if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def statistics_table(statistics: Mapping[str, Any]) -> Table:
    """A column per part (training, testing), a row per figure; figures of no part stand in the first column."""
    parts = {name: value for name, value in statistics.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in statistics.items() if not isinstance(value, (Mapping, list))}
    names = list(dict.fromkeys(key for part in parts.values() for key in part))
    rows = [[_words(key), *(_number(part.get(key)) for part in parts.values())] for key in names]
    width = max(len(parts), 1)
    rows += [[_words(key), _number(value), *[""] * (width - 1)] for key, value in single.items()]
    return Table(("", *(map(_words, parts) if parts else ("value",))), rows)


def escape_markdown(text: str) -> str:
    """Text on one line, escaped so that Markdown shows it literally."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$])", r"\\\1", line)


def _words(key: Any) -> str:
    return str(key).removeprefix("num_").replace("_", " ")


def _number(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _width(text: str) -> int:
    """Columns of a terminal that a text takes; wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _widen(widths: list[int], groups: Sequence[tuple[str, int]]) -> None:
    """Widen the last column of each group whose title is longer than its columns."""
    at = 0
    for title, span in groups:
        lacking = _width(title) - sum(widths[at : at + span]) - 2 * (span - 1)
        if lacking > 0:
            widths[at + span - 1] += lacking
        at += span
