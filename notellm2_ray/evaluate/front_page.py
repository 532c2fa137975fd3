"""The front page of the report: the tables of recall and of ranking, as far as they are there, with links to both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.evaluate.ranking import tables as ranking_tables
from notellm2_ray.evaluate.ranking.page import FRONT_PAGE
from notellm2_ray.evaluate.recall.report import Section, render, section_markdown
from notellm2_ray.evaluate.recall.tables import recall_table

TITLE = "NoteLLM-2 and MLLM-MSR: report"
_LEAD = "Recall of related notes by embeddings, and ranking of candidates by what is known of a user."


@dataclass(frozen=True)
class _Half(Section):
    links: Sequence[tuple[str, str]] = ()


def write_front_page(report: Path) -> None:
    """Write ``index.html`` and ``index.md`` over the halves that are there.

    Args:
        report: the directory with ``retrieval/`` and ``ranking/``, each as its evaluation wrote it.

    Raises:
        OutputError: neither is there, or one is damaged.
    """
    report = Path(report)
    halves = []
    retrieval, ranking = _results(report / "retrieval"), _results(report / "ranking")
    if retrieval is not None:
        text = f"{retrieval['pairs']['all']:,} test pairs over a pool of {retrieval['pool_notes']:,} notes."
        halves.append(_Half("Recall", text, [recall_table(retrieval)], links=_links(report, "retrieval")))
    if ranking is not None:
        for name, one in ranking["protocols"].items():
            title = f"Ranking: {ranking_tables.PROTOCOL_NAMES.get(name, name).lower()}"
            shown = [ranking_tables.ranking_table(one), ranking_tables.strata_table(one)]
            halves.append(_Half(title, ranking_tables.lead(one), shown, links=_links(report, "ranking")))
    if not halves:
        raise OutputError(f"{report} holds no evaluation: run eval-retrieval or eval-ranking first")
    write_atomically(report / "index.html", render(FRONT_PAGE, TITLE, _LEAD, halves))
    write_atomically(report / "index.md", _markdown(halves))


def _results(directory: Path) -> Mapping[str, Any] | None:
    path = directory / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}): delete {directory} and run its evaluation again") from error


def _links(report: Path, half: str) -> list[tuple[str, str]]:
    """Relative links to what that half wrote."""
    names = {"index.html": "Full report", "report.md": "as Markdown", "index.md": "as Markdown", "table.txt": "as text"}
    return [(name, f"{half}/{file}") for file, name in names.items() if (report / half / file).is_file()]


def _markdown(halves: Sequence[_Half]) -> str:
    lines = [f"# {TITLE}", _LEAD]
    for half in halves:
        lines += section_markdown(half)
        lines.append(" · ".join(f"[{name}]({target})" for name, target in half.links))
    return "\n\n".join(lines) + "\n"
