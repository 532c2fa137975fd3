"""The front page of the report: the main tables of recall and of ranking, with links to both reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import OutputError
from notellm2_ray.evaluate.pages import Section, write_pages
from notellm2_ray.evaluate.ranking import tables as ranking_tables
from notellm2_ray.evaluate.recall import tables as recall_tables
from notellm2_ray.evaluate.templates import DONE, EACH, END, HEAD_END, SECTION, START, TABLE, TITLE

_LEAD = "Recall of related notes by embeddings, and ranking of candidates by what is known of a user."
_STYLE = """
.links a { margin-right: 1.2rem; }
a { color: inherit; }
"""
_LINKS = """{% if part.links %}<p class="links">{% for name, target in part.links %}
<a href="{{ target }}">{{ name }}</a>{% endfor %}</p>{% endif %}
"""
_PAGE = START + _STYLE + HEAD_END + TABLE + TITLE + EACH + SECTION + _LINKS + DONE + END


@dataclass(frozen=True)
class _Half(Section):
    links: Sequence[tuple[str, str]] = ()

    def more_markdown(self) -> list[str]:
        return [" · ".join(f"[{name}]({target})" for name, target in self.links)]


def write_front_page(report: Path) -> None:
    """Write ``index.html`` and ``report.md`` over the halves that are there.

    Args:
        report: the directory that holds ``retrieval/`` and ``ranking/``, as their evaluations wrote them.

    Raises:
        OutputError: neither half is there, or one is damaged.
    """
    report = Path(report)
    halves = []
    retrieval, ranking = _results(report / "retrieval"), _results(report / "ranking")
    if retrieval is not None:
        shown = [recall_tables.recall_table(retrieval)]
        halves.append(_Half("Recall", recall_tables.lead(retrieval), shown, links=_links(report, "retrieval")))
    if ranking is not None:
        for name, one in ranking["protocols"].items():
            title = f"Ranking: {ranking_tables.PROTOCOL_NAMES.get(name, name).lower()}"
            shown = [ranking_tables.ranking_table(one), ranking_tables.strata_table(one)]
            halves.append(_Half(title, ranking_tables.lead(one), shown, links=_links(report, "ranking")))
    if not halves:
        raise OutputError(f"{report} holds no evaluation: run eval-retrieval or eval-ranking first")
    write_pages(report, _PAGE, "NoteLLM-2 and MLLM-MSR: report", _LEAD, halves)


def _results(directory: Path) -> Mapping[str, Any] | None:
    path = directory / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}): delete {directory} and run its evaluation again") from error


def _links(report: Path, half: str) -> list[tuple[str, str]]:
    """Relative links to the files of that half."""
    names = {"index.html": "Full report", "report.md": "as Markdown", "table.txt": "as text"}
    return [(name, f"{half}/{file}") for file, name in names.items() if (report / half / file).is_file()]
