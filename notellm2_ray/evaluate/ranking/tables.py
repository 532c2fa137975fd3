"""Ranking results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    names = {"auc": "AUC", "user_auc": "AUC per user"}
    return names.get(figure, f"{name.upper()}@{k}")


def main_figures(results: Mapping[str, Any]) -> list[str]:
    """The paper's figures, at k = 5 if that was measured, with the AUC per user and NDCG."""
    k = 5 if 5 in results["cutoffs"] else results["cutoffs"][0]
    return ["auc", "user_auc", f"hr@{k}", f"mrr@{k}", f"ndcg@{k}"]


def ranking_table(results: Mapping[str, Any], figures: Sequence[str] | None = None) -> Table:
    """All methods on all targets, in percent: mean and deviation over seeds; the first figure with its interval.

    Args:
        results: of :func:`notellm2_ray.evaluate.ranking.results.evaluate_protocol`.
        figures: columns; None: the main figures.
    """
    chosen = list(figures or main_figures(results))
    marks = _marks(results)
    cells = []
    for row in results["rows"]:
        values = row["figures"]["all"]
        marked = [percent(values[name]) + marks.get((row["method"], name), "") for name in chosen]
        cells.append([row["method"], str(len(row["seeds"]) or 1), marked[0], _interval(values[chosen[0]]), *marked[1:]])
    labels = [figure_label(name) for name in chosen]
    level = f"{100 * results['confidence']:g}%"
    columns = ("Method", "Seeds", labels[0], f"{labels[0]}, {level} interval", *labels[1:])
    strong = {(row, 2 if at == 0 else at + 3) for at, name in enumerate(chosen) for row in _best(results, name)}
    return Table(columns, cells, notes=_notes(results, cells), strong=strong)


def strata_table(results: Mapping[str, Any]) -> Table:
    """The first three main figures of warm and of cold targets."""
    strata = [name for name in ("warm", "cold") if results["examples"][name]]
    auc, user_auc, hits, *_ = main_figures(results)
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
    """The tests of some roles ("reference", "ablation", "control"), one row per pair of methods and figure."""
    wanted = list(figures or (main_figures(results)[at] for at in (0, 2, 3)))
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
            p_value(test["p_users"]),
            "yes" if test["significant"] else "no",
        ]
        for test in chosen
    ]
    kinds = sorted({test["seeds_test"] for test in chosen})
    notes = (
        "Difference in percentage points. p over seeds: two-sided t-test (" + "; ".join(kinds) + ").",
        "p over users: paired permutation test of the users' figures; a paired bootstrap for the pooled AUC.",
        f"Significant: p < {results['level']} over users, and over seeds too where that test exists; not corrected for "
        "the number of comparisons.",
    )
    columns = ("Method", "Against", "Figure", "Difference", "p seeds", "p users", "Significant")
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


def printed(results: Mapping[str, Any]) -> str:
    """All protocols' tables as text.

    Args:
        results: ``{"protocols": {name: results of evaluate_protocol}}``.
    """
    parts = []
    for name, one in results["protocols"].items():
        parts += [f"{PROTOCOL_NAMES.get(name, name)}: {lead(one)}", str(ranking_table(one)), str(strata_table(one))]
        tests = significance_table(one, ("reference", "ablation", "control"), figures=["auc"])
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


def _marks(results: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """A star if a ranker is significantly above every reference that it was tested against."""
    verdicts: dict[tuple[str, str], list[bool]] = {}
    for test in results["tests"]:
        if test["role"] == "reference" and test["stratum"] == "all":
            above = test["significant"] and test["difference"] > 0
            verdicts.setdefault((test["method"], test["figure"]), []).append(above)
    kinds = {row["method"]: row["kind"] for row in results["rows"]}
    return {key: "*" for key, above in verdicts.items() if all(above) and kinds[key[0]] == "ranker"}


def _best(results: Mapping[str, Any], figure: str) -> list[int]:
    means = [row["figures"]["all"][figure]["mean"] for row in results["rows"]]
    return [at for at, mean in enumerate(means) if mean == max(means)]


def _notes(results: Mapping[str, Any], cells: Sequence[Sequence[str]]) -> list[str]:
    text = " ".join(cell for row in cells for cell in row[2:])
    notes = [
        "In %. AUC: over all rows at once, of all users. AUC per user: within each target's candidates, mean. HR, MRR "
        "and NDCG: ties count against the method; MRR is 0 beyond k. Interval: bootstrap over users."
    ]
    if "±" in text:
        notes.append("±: standard deviation over seeds.")
    if "*" in text:
        against = list(dict.fromkeys(test["against"] for test in results["tests"] if test["role"] == "reference"))
        notes.append(f"*: above every reference row ({', '.join(against)}), p < {results['level']}.")
    return notes


def _interval(figure: Mapping[str, Any]) -> str:
    return NOT_MEASURED if figure["low"] is None else f"[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"
