"""Plots that both reports share, and how every plot is drawn: as PNG, once for light and once for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Theme(NamedTuple):
    """Colours of a page, and the suffix of the plots drawn in them."""

    suffix: str
    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


# Hues that colour-blind readers can tell apart, in a fixed order. Further series repeat them with another dash.
THEMES = (
    Theme(
        "", "#fcfcfb", "#1b1b1a", "#5d5c58", "#e3e2de",
        ("#2a78d6", "#eb6834", "#1baf7a", "#b97f00", "#c44f86", "#008300", "#4a3aa7", "#d23a39"),
    ),
    Theme(
        "_dark", "#1a1a19", "#f4f4f1", "#b3b2ab", "#3a3a37",
        ("#5b9ee8", "#f0824f", "#35c791", "#d9a13a", "#e08ab2", "#4bb04b", "#9a8df0", "#f07271"),
    ),
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")
HISTORY_TITLES = {
    "loss": "Training loss",
    "recall": "Recall on validation pairs during training",
    "auc": "AUC on validation targets during training",
}
SMOOTHED_POINTS = 150  # a curve with more points is averaged down to about this many


def history_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path, figure: str = "loss"
) -> Path | None:
    """A figure of the training history against the step, a line per run.

    Args:
        histories: run name to its logged steps; a step has ``step`` and any figures, nested or not.
        directory: where the PNG goes.
        figure: "loss", "recall" for the validation recall, or "auc" for a ranker's validation AUC.

    Returns:
        The light PNG; the dark one lies beside it. None if no run logged such a figure.
    """
    found = {name: _series(history, figure) for name, history in histories.items()}
    curves = {name: curve for name, curve in found.items() if curve is not None}
    if not curves:
        return None
    key = next(iter(curves.values()))[2]
    # A colour per model, a dash per seed.
    models, seeds = (list(dict.fromkeys(parts)) for parts in zip(*map(_model_and_seed, curves), strict=True))

    def draw(axes: Any, theme: Theme) -> None:
        for name, (steps, values, _) in curves.items():
            model, seed = _model_and_seed(name)
            colour = theme.series[models.index(model) % len(theme.series)]
            dash = DASHES[seeds.index(seed) % len(DASHES)]
            marker = "o" if len(steps) < 12 else None
            axes.plot(
                steps, values, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=4, label=name
            )
        axes.set_xlabel("training step")
        axes.set_ylabel(key.replace("_", " ").replace(".", " "))
        axes.set_ylim(bottom=0)

    title = HISTORY_TITLES[figure]
    return save_figure(draw, title, directory / f"training_{figure}.png")


def _series(history: Sequence[Mapping[str, Any]], figure: str) -> tuple[list[float], list[float], str] | None:
    """Steps, values and key of the first figure of that kind; a long series is averaged over windows."""
    flat = [_flatten(entry) for entry in history]
    keys = list(dict.fromkeys(key for entry in flat for key in entry))
    if figure == "loss":
        keys = [key for key in keys if key.split(".")[-1] in ("loss", "train_loss")]
    else:
        keys = [key for key in keys if figure in key]
    if not keys:
        return None
    points = [(entry["step"], entry[keys[0]]) for entry in flat if keys[0] in entry and "step" in entry]
    if not points:
        return None
    window = -(-len(points) // SMOOTHED_POINTS)
    groups = [points[start : start + window] for start in range(0, len(points), window)]
    means = [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
    return [step for step, _ in means], [value for _, value in means], keys[0]


def _model_and_seed(name: str) -> tuple[str, str]:
    model, _, seed = name.partition("-seed")
    return model, seed


def _flatten(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


def save_figure(draw: Callable[[Any, Theme], None], title: str, path: Path) -> Path:
    """Draw once per theme: light at ``path``, dark beside it. Named lines get a legend."""
    # Figure instead of pyplot, which would choose a backend for the process and keep every figure in memory.
    from matplotlib.figure import Figure

    for theme in THEMES:
        figure = Figure(figsize=(7.2, 4.4), dpi=130, facecolor=theme.surface, layout="constrained")
        axes = figure.add_subplot(facecolor=theme.surface)
        draw(axes, theme)
        axes.set_title(title, color=theme.ink, fontsize=11, loc="left")
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.muted, labelsize=9)
        axes.xaxis.label.set_color(theme.muted)
        axes.yaxis.label.set_color(theme.muted)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.grid)
        few = len(axes.lines) <= 10
        place = {"loc": "best"} if few else {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8.5, frameon=False, labelcolor=theme.ink, handlelength=2.6, **place)
        figure.savefig(path.with_name(f"{path.stem}{theme.suffix}.png"))
    return path
