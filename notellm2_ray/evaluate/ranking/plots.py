"""Plots of the ranking report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from notellm2_ray.evaluate.plots import Theme, save_figure
from notellm2_ray.evaluate.ranking.tables import PROTOCOL_NAMES, figure_label


def interval_plot(results: Mapping[str, Any], directory: Path, figure: str = "auc") -> Path:
    """A point per method with its interval over users; a colour per kind of method; chance is a dotted line.

    Args:
        results: of :func:`notellm2_ray.evaluate.ranking.results.evaluate_protocol`.

    Returns:
        The light PNG; the dark one lies beside it.
    """
    rows = [(row["method"], row["kind"], row["figures"]["all"][figure]) for row in results["rows"]]
    kinds = list(dict.fromkeys(kind for _, kind, _ in rows))

    def draw(axes: Any, theme: Theme) -> None:
        for kind in kinds:
            chosen = [(at, one) for at, (_, its, one) in enumerate(rows) if its == kind]
            colour = theme.series[("ranker", "baseline", "control", "untuned").index(kind)]
            means = [100 * one["mean"] for _, one in chosen]
            low = [100 * (one["mean"] - one["low"]) if one["low"] is not None else 0 for _, one in chosen]
            high = [100 * (one["high"] - one["mean"]) if one["high"] is not None else 0 for _, one in chosen]
            spread = [[max(value, 0) for value in side] for side in (low, high)]
            places = [at for at, _ in chosen]
            axes.errorbar(means, places, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5, label=kind)
        axes.axvline(50, color=theme.muted, linestyle=":", linewidth=1.2)
        axes.set_yticks(range(len(rows)), [method.replace("$", r"\$") for method, _, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"{figure_label(figure)}, %")

    name = PROTOCOL_NAMES.get(results["protocol"], results["protocol"])
    return save_figure(draw, name, directory / f"{figure}_{results['protocol']}.png")


def sweep_plot(sweep: Mapping[str, Any], directory: Path) -> Path | None:
    """The figures against the swept setting; None if no trial succeeded."""
    points = [point for point in sweep["points"] if point["metrics"]]
    names = list(dict.fromkeys(name for point in points for name in point["metrics"]))
    if not points:
        return None

    def draw(axes: Any, theme: Theme) -> None:
        for at, name in enumerate(names):
            measured = [point for point in points if name in point["metrics"]]
            values = [100 * point["metrics"][name] for point in measured]
            places = [point["value"] for point in measured]
            axes.plot(places, values, color=theme.series[at], marker="o", linewidth=1.8, label=figure_label(name))
        axes.set_xticks([point["value"] for point in points])
        axes.set_xlabel(sweep["parameter"])
        axes.set_ylabel("%")

    return save_figure(draw, f"{sweep['parameter']} swept", directory / f"sweep_{sweep['name']}.png")
