"""The report of recall: ``index.html`` (one file, pictures inside), ``report.md``, and the plots as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from notellm2_ray.evaluate.pages import Section, with_thumbnail, write_pages
from notellm2_ray.evaluate.plots import history_curves
from notellm2_ray.evaluate.recall import plots, tables
from notellm2_ray.evaluate.recall.page import PAGE
from notellm2_ray.evaluate.tables import escape_markdown, statistics_table


@dataclass(frozen=True)
class RecallSection(Section):
    """A section of the recall report."""

    samples: Sequence[tuple[str, list[dict[str, Any]]]] = ()  # method and its sample queries

    @property
    def empty(self) -> bool:
        return super().empty and not self.samples

    def more_markdown(self) -> list[str]:
        lines = []
        for method, samples in self.samples:
            lines += [f"### {escape_markdown(method)}", *map(_sample_markdown, samples)]
        return lines


def write_report(
    output: Path,
    *,
    results: Mapping[str, Any],
    statistics: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    index_info: Mapping[str, Any],
) -> None:
    """Write ``index.html``, ``report.md`` and the plots into an existing directory.

    All text of notes and settings is escaped; the page has no script and fetches nothing.

    Args:
        output: the directory.
        results: of :func:`notellm2_ray.evaluate.recall.results.evaluate`; ``remarks`` may add sentences on the pairs.
        statistics: figures of each part ("train", "test") of the data, as in the paper's Table 1.
        histories: run name to its logged training steps, each with ``step``, ``loss`` and, at some steps, a validation
            recall; empty if nothing was trained.
        samples: of :func:`notellm2_ray.evaluate.recall.samples.sample_neighbors`, method by method.
        settings: the resolved settings.
        index_info: ``AnnIndex.info``, or several by name.
    """
    output = Path(output)
    sections = [
        _recall(results),
        _curves(results, output),
        _inputs(results),
        _significance(results),
        RecallSection("Dataset", tables=[statistics_table(statistics)] if statistics else []),
        _training(histories, output),
        RecallSection("Index", tables=[statistics_table(index_info)] if index_info else []),
        _neighbors(samples),
        RecallSection("Settings", listing=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)),
    ]
    lead = " ".join([tables.lead(results), *results.get("remarks", ())])
    write_pages(output, PAGE, "Recall report", lead, sections)


def _recall(results: Mapping[str, Any]) -> RecallSection:
    folded = [("Mean reciprocal rank, times 100", tables.mrr_table(results))]
    if any(results["pairs"][name] for name in tables.LONG_STRATA):
        folded.insert(0, ("Long notes", tables.recall_table(results, tables.LONG_STRATA)))
    warmth = tables.warmth_table(results)
    shown = [tables.recall_table(results), *([warmth] if warmth else [])]
    return RecallSection("Recall", tables=shown, folded=folded)


def _inputs(results: Mapping[str, Any]) -> RecallSection:
    table = tables.recall_table(results, inputs=True)
    text = "Each embedder with both modalities, with the image alone and with the text alone."
    return RecallSection("Recall by input", text, [table] if table.rows else [])


def _curves(results: Mapping[str, Any], output: Path) -> RecallSection:
    drawn = [plots.recall_curves(results, output, stratum) for stratum in ("all", "short_query")]
    return RecallSection("Recall curves", "Baselines are dashed.", plots=[path for path in drawn if path])


def _training(histories: Mapping[str, Sequence[Mapping[str, Any]]], output: Path) -> RecallSection:
    drawn = [history_curves(histories, output, figure) for figure in ("loss", "recall")]
    return RecallSection("Training", plots=[path for path in drawn if path])


def _significance(results: Mapping[str, Any]) -> RecallSection:
    roles = ("best other", "best baseline", "reference")
    by_role = {role: tables.significance_table(results, role, ("all", "short_query")) for role in roles}
    shown = [table for table in by_role.values() if table.rows]
    if not shown:
        return RecallSection("Significance")
    more = {f"Against the {role}, all strata": role for role, table in by_role.items() if table.rows}
    everything = [
        (name, tables.significance_table(results, role, tuple(results["pairs"]))) for name, role in more.items()
    ]
    return RecallSection("Significance", tables=shown, folded=everything)


def _neighbors(samples: Sequence[Mapping[str, Any]]) -> RecallSection:
    drawn = [
        {
            "method": sample["method"],
            "query": with_thumbnail(sample["query"]),
            "neighbors": [with_thumbnail(note) for note in sample["neighbors"]],
        }
        for sample in samples
    ]
    by_method = [(method, list(group)) for method, group in groupby(drawn, key=lambda sample: sample["method"])]
    text = "The query comes first, then its nearest notes with rank and cosine. True targets are marked, near or far."
    return RecallSection("Neighbours", text, samples=by_method)


def _sample_markdown(sample: Mapping[str, Any]) -> str:
    query = sample["query"]
    lines = [f"**{escape_markdown(query['title'])}** ({escape_markdown(query['note_id'])})", ""]
    for note in sample["neighbors"]:
        mark = " **← target**" if note["is_target"] else ""
        lines.append(f"- {note['rank']}: {escape_markdown(note['title'])} ({note['score']:.3f}){mark}")
    return "\n".join(lines)
