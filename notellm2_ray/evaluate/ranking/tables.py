"""Ranking results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from notellm2_ray.evaluate.comparisons import mark_notes, marks, seeds_note
from notellm2_ray.evaluate.ranking.metrics import main_figures
from notellm2_ray.evaluate.tables import NOT_MEASURED, Table, p_value, percent

PROTOCOL_NAMES = {
    "uniform": "Uniform negatives",
    "popular": "Negatives as popular as the target",
    "published": "Published construction (leaks popularity)",
}
STRATUM_NAMES = {"all": "All targets", "warm": "Warm targets", "cold": "Cold targets"}


def figure_label(figure: str) -> str:
    """A figure's name in the header of its column."""
    name, _, k = figure.partition("@")
    names = {"auc": "AUC", "auc_norm": "AUC norm.", "user_auc": "AUC per user"}
    return names.get(figure, f"{name.upper()}@{k}")


def ranking_table(results: Mapping[str, Any], figures: Sequence[str] | None = None) -> Table:
    """All methods on all targets, in percent: mean and deviation over seeds; the first figure with its interval.

    Args:
        results: of :func:`notellm2_ray.evaluate.ranking.results.evaluate_protocol`.
        figures: columns; None: the main figures.
    """
    chosen = list(figures or main_figures(results["cutoffs"]))
    tests = [test for test in results["tests"] if test["stratum"] == "all" and test["figure"] in chosen]
    marked = marks(tests, lambda test: (test["method"], test["figure"]))
    cells = []
    for row in results["rows"]:
        values = row["figures"]["all"]
        shown = [percent(values[name]) + marked.get((row["method"], name), "") for name in chosen]
        cells.append([row["method"], str(len(row["seeds"]) or 1), shown[0], _interval(values[chosen[0]]), *shown[1:]])
    labels = [figure_label(name) for name in chosen]
    level = f"{100 * results['confidence']:g}%"
    columns = ("Method", "Seeds", labels[0], f"{labels[0]}, {level} interval", *labels[1:])
    strong = {(row, 2 if at == 0 else at + 3) for at, name in enumerate(chosen) for row in _best(results, name)}
    notes = [*_notes(cells), *mark_notes(str(cells), tests, "users")]
    return Table(columns, cells, notes=notes, strong=strong)


def strata_table(results: Mapping[str, Any]) -> Table:
    """The AUC, the AUC per user and the HR of warm and of cold targets."""
    strata = [name for name in ("warm", "cold") if results["examples"][name]]
    auc, _, user_auc, hits, *_ = main_figures(results["cutoffs"])
    chosen = [auc, user_auc, hits]
    cells = []
    for row in results["rows"]:
        values = [row["figures"][stratum] for stratum in strata]
        cells.append([row["method"], *(percent(value[name]) for value in values for name in chosen)])
    groups = [("", 1), *((f"{STRATUM_NAMES[name]} ({results['examples'][name]:,})", len(chosen)) for name in strata)]
    notes = ("In %. A target is cold if it has no clicks besides those to predict.",)
    columns = ("Method", *[figure_label(name) for name in chosen] * len(strata))
    return Table(columns, cells, groups, notes=notes)


def interval_table(results: Mapping[str, Any], stratum: str = "all") -> Table:
    """Every figure of a stratum with its interval over users."""
    figures = list(results["rows"][0]["figures"][stratum] or ()) if results["rows"] else []
    cells = []
    for row in results["rows"]:
        values = row["figures"][stratum] or {}
        cells.append([row["method"], *(f"{percent(values[name])} {_interval(values[name])}" for name in figures)])
    return Table(("Method", *map(figure_label, figures)), cells)


def significance_table(
    results: Mapping[str, Any], roles: Sequence[str], stratum: str = "all", figures: Sequence[str] | None = None
) -> Table:
    """The comparisons of some roles (see ``evaluate_protocol``), one row per pair of methods and figure."""
    wanted = list(figures or (main_figures(results["cutoffs"])[at] for at in (0, 1, 3, 4)))
    chosen = [
        test
        for test in results["tests"]
        if test["role"] in roles and test["stratum"] == stratum and test["figure"] in wanted
    ]
    rows = [
        [
            test["method"],
            test["against"],
            figure_label(test["figure"]),
            f"{100 * test['difference']:+.2f}",
            p_value(test["p_seeds"]),
            p_value(test["p_units"]),
            p_value(test["p_holm"]),
            "yes" if test["significant"] else "no",
        ]
        for test in chosen
    ]
    unit_test = (
        "p users: two-sided paired permutation test over users; for a pooled AUC, a paired bootstrap over users."
    )
    notes = seeds_note(chosen, unit_test)
    columns = ("Method", "Against", "Figure", "Difference", "p seeds", "p users", "p Holm", "Significant")
    return Table(columns, rows, num_labels=3, notes=notes if rows else ())


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """One row per value of the swept setting."""
    names = list(dict.fromkeys(name for point in sweep["points"] for name in point["metrics"]))
    rows = [
        [
            str(point["value"]),
            *(f"{100 * point['metrics'][n]:.2f}" if n in point["metrics"] else NOT_MEASURED for n in names),
            point.get("error") or "",
        ]
        for point in sweep["points"]
    ]
    return Table((sweep["parameter"], *map(figure_label, names), ""), rows)


def tuning_table(tuned: Mapping[str, Any]) -> Table:
    """What was tried for each baseline that was tuned, with the AUC on validation targets in percent."""
    knobs = list(dict.fromkeys(knob for one in tuned.values() for point in one["points"] for knob in point["knobs"]))
    rows = [
        [
            name,
            *(f"{point['knobs'][knob]:g}" for knob in knobs),
            f"{100 * point['validation_auc']:.2f}",
            "chosen" if point["chosen"] else "",
        ]
        for name, one in tuned.items()
        for point in one["points"]
    ]
    return Table(("Baseline", *(knob.replace("_", " ") for knob in knobs), "Validation AUC", ""), rows)


def printed(results: Mapping[str, Any]) -> str:
    """All protocols' tables as text.

    Args:
        results: ``{"protocols": {name: results of evaluate_protocol}}``.
    """
    parts = []
    for name, one in results["protocols"].items():
        parts += [f"{PROTOCOL_NAMES.get(name, name)}: {lead(one)}", str(ranking_table(one)), str(strata_table(one))]
        tests = significance_table(one, ("best other", "best baseline", "ablation", "control"), figures=["auc"])
        parts += [str(tests)] if tests.rows else []
    return "\n\n".join(parts) + "\n"


def lead(results: Mapping[str, Any]) -> str:
    """The size of a protocol's task, in one line."""
    least, most = results["candidates"]
    many = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"{results['examples']['all']:,} targets of {results['users']['all']:,} users, each among {many} candidates; "
        f"{results['examples']['cold']:,} targets are cold."
    )


def _best(results: Mapping[str, Any], figure: str) -> list[int]:
    means = [row["figures"]["all"][figure]["mean"] for row in results["rows"]]
    return [at for at, mean in enumerate(means) if mean == max(means)]


def _notes(cells: Sequence[Sequence[str]]) -> list[str]:
    text = " ".join(cell for row in cells for cell in row[2:])
    notes = [
        "In %. AUC: over the candidates of all users at once, by the scores as they are; those of sequential models "
        "are not made to be compared between users. AUC norm.: the same, with scores normalised among each target's "
        "candidates. AUC per user: within each target's candidates, mean. HR, MRR and NDCG: ties count against the "
        "method; MRR is 0 beyond k. Interval: bootstrap over users."
    ]
    if "±" in text:
        notes.append("±: standard deviation over seeds.")
    return notes


def _interval(figure: Mapping[str, Any]) -> str:
    return NOT_MEASURED if figure["low"] is None else f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
