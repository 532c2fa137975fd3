"""The report of ranking: ``index.html`` (one file, pictures inside), ``report.md``, and the plots as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from notellm2_ray.evaluate.pages import Section, with_thumbnail, write_pages
from notellm2_ray.evaluate.plots import history_curves
from notellm2_ray.evaluate.ranking import plots, tables
from notellm2_ray.evaluate.ranking.page import PAGE
from notellm2_ray.evaluate.tables import escape_markdown, statistics_table


@dataclass(frozen=True)
class RankingSection(Section):
    """A section of the ranking report."""

    users: Sequence[Mapping[str, Any]] = ()

    @property
    def empty(self) -> bool:
        return super().empty and not self.users

    def more_markdown(self) -> list[str]:
        return [line for user in self.users for line in _user_markdown(user)]


def write_report(
    output: Path,
    *,
    results: Mapping[str, Any],
    statistics: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    sweeps: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``index.html``, ``report.md`` and the plots into an existing directory.

    All text of notes, models and settings is escaped; the page has no script and fetches nothing.

    Args:
        output: the directory.
        results: ``protocols``: name to results of evaluate_protocol; ``remarks``: sentences on how rows were made.
        statistics: of the sequences stage: name to a figure, or to several figures by name.
        histories: run name to its logged training steps, each with ``step``, ``loss`` and, at some, ``valid_auc``.
        samples: of :func:`notellm2_ray.evaluate.ranking.samples.sample_users`.
        settings: the resolved settings.
        sweeps: of :func:`notellm2_ray.pipeline.sweep.run_sweep`.
    """
    output = Path(output)
    sections = [
        *(_protocol(one, output) for one in results["protocols"].values()),
        *(_tests(one) for one in results["protocols"].values()),
        _tuned(results.get("tuned_baselines", {})),
        *(_sweep(one, output) for one in sweeps),
        _training(histories, output),
        RankingSection("Dataset", tables=[statistics_table(statistics)] if statistics else []),
        _users(samples),
        RankingSection("Settings", listing=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)),
    ]
    write_pages(output, PAGE, "Ranking report", " ".join(results.get("remarks", ())), sections)


def _protocol(results: Mapping[str, Any], output: Path) -> RankingSection:
    all_figures = list(results["rows"][0]["figures"]["all"]) if results["rows"] else []
    folded = [
        ("All figures", tables.ranking_table(results, all_figures)),
        ("All figures with their intervals over users", tables.interval_table(results)),
    ]
    folded += [
        (f"{tables.STRATUM_NAMES[name]} with their intervals over users", tables.interval_table(results, name))
        for name in ("warm", "cold")
        if results["examples"][name]
    ]
    return RankingSection(
        tables.PROTOCOL_NAMES.get(results["protocol"], results["protocol"]),
        tables.lead(results),
        [tables.ranking_table(results), tables.strata_table(results)],
        folded,
        [plots.interval_plot(results, output)],
    )


def _tests(results: Mapping[str, Any]) -> RankingSection:
    name = tables.PROTOCOL_NAMES.get(results["protocol"], results["protocol"])
    every = [("best other",), ("best baseline",), ("ablation", "control"), ("baseline",)]
    folded = [
        (f"{tables.STRATUM_NAMES[stratum]}, all tests", tables.significance_table(results, sum(every, ()), stratum))
        for stratum in ("warm", "cold")
        if results["examples"][stratum]
    ]
    shown = [table for roles in every if (table := tables.significance_table(results, roles)).rows]
    text = (
        "The best row against the second; each method against the best baseline; the first ranker against its "
        "ablations and controls; each ranker against every baseline."
    )
    return RankingSection(f"Significance: {name.lower()}", text, shown, folded if shown else [])


def _tuned(tuned: Mapping[str, Any]) -> RankingSection:
    text = "Every combination of ranking.baseline_grid, with one seed. The best on validation targets is used."
    return RankingSection("Tuned baselines", text, [tables.tuning_table(tuned)] if tuned else [])


def _sweep(sweep: Mapping[str, Any], output: Path) -> RankingSection:
    drawn = plots.sweep_plot(sweep, output)
    return RankingSection(
        f"Sweep of {sweep['parameter']}",
        sweep.get("text", ""),
        [tables.sweep_table(sweep)],
        plots=[drawn] if drawn else [],
    )


def _training(histories: Mapping[str, Sequence[Mapping[str, Any]]], output: Path) -> RankingSection:
    drawn = [history_curves(histories, output, figure) for figure in ("loss", "auc")]
    return RankingSection("Training", plots=[path for path in drawn if path])


def _users(samples: Sequence[Mapping[str, Any]]) -> RankingSection:
    text = (
        "The history block by block, each block with the preference that was written after it; then the candidates by "
        "P(yes). The note that the user took next is marked."
    )
    return RankingSection("Users", text, users=[_with_pictures(user) for user in samples])


def _with_pictures(user: Mapping[str, Any]) -> dict[str, Any]:
    blocks = [{**block, "notes": list(map(_card, block["notes"]))} for block in user["blocks"]]
    return {**user, "blocks": blocks, "candidates": list(map(_card, user["candidates"]))}


def _card(note: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": 0, "is_target": False, **with_thumbnail(note)}


def _user_markdown(user: Mapping[str, Any]) -> list[str]:
    escape = escape_markdown
    lines = [f"### {escape(user['method'])}: user {escape(user['user_id'])}, target at {user['target_rank']}"]
    for block in user["blocks"]:
        lines.append("\n".join(f"- {escape(note['title'])}" for note in block["notes"]))
        if block["preference"]:
            lines.append(f"> {escape(block['preference'])}")
    ranked = [
        f"{note['rank']}. {escape(note['title'])} ({note['score']:.3f}){' **← target**' if note['is_target'] else ''}"
        for note in user["candidates"]
    ]
    return [*lines, "\n".join(ranked)]
