"""Plots of the recall report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from notellm2_ray.evaluate.plots import Theme, save_figure
from notellm2_ray.evaluate.recall.tables import STRATUM_NAMES


def recall_curves(results: Mapping[str, Any], directory: Path, stratum: str = "all") -> Path | None:
    """Recall@k against k, a line per method with its main inputs; baselines dashed, chance dotted.

    Returns:
        The light PNG; the dark one lies beside it as ``*_dark.png``. None if the stratum has no pairs.
    """
    rows = [row for row in results["rows"] if row["main"] and row["curve"].get(stratum)]
    if not rows:
        return None

    def draw(axes: Any, theme: Theme) -> None:
        for at, row in enumerate(rows):
            curve = row["curve"][stratum]
            axes.plot(
                curve["k"],
                [100 * value for value in curve["recall"]],
                color=theme.series[at % len(theme.series)],
                linestyle="-" if row["kind"] == "embedder" else "--",
                linewidth=2.2 if row["kind"] == "embedder" else 1.5,
                label=row["method"],
            )
        ks, most = rows[0]["curve"][stratum]["k"], max(results["pool_notes"] - 1, 1)
        axes.plot(
            ks, [100 * min(k / most, 1) for k in ks], color=theme.muted, linestyle=":", linewidth=1.2, label="chance"
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(0, 102)
        axes.set_xlabel("k (notes recalled)")
        axes.set_ylabel("Recall@k, %")

    title = f"{STRATUM_NAMES[stratum]}: {results['pairs'][stratum]:,} pairs, pool of {results['pool_notes']:,} notes"
    return save_figure(draw, title, directory / f"recall_{stratum}.png")
