"""Sweeps of one setting of the recommender (Figures 5 and 6 of MLLM-MSR), with Ray Tune.

A trial is a whole run with that setting changed. It has its own workspace inside the parent's, and shares the outputs
that do not depend on the setting. A sweep resumes like any run: finished outputs are not made again.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.core.run import write_atomically
from notellm2_ray.core.workspace import Workspace

log = logging.getLogger("notellm2_ray")

METRICS = ("auc", "user_auc", "hr@5", "mrr@5")
_SHARED = ("prepared", "tiny", "tiny_mllm", "image_summaries")


class Sweep(NamedTuple):
    """A setting to sweep, and its values."""

    name: str  # directory and command-line name
    parameter: str  # dotted name in the settings
    values: tuple[int, ...]
    text: str
    together: tuple[str, ...] = ()  # further settings that get the same value


SWEEPS: dict[str, Sweep] = {
    sweep.name: sweep
    for sweep in (
        Sweep(
            "block_size",
            "sequences.block_size",
            (1, 2, 3, 4, 5),
            "Events in a block of history (the paper's Figure 5: best at 3).",
        ),
        Sweep(
            "context_length",
            "ranker.max_preference_tokens",
            (16, 32, 64, 128, 256),
            "Tokens of a preference, both when it is written and when the ranker reads it (the paper's Figure 6: flat "
            "from the third of five points).",
            ("preferences.max_tokens",),
        ),
    )
}


def overrides(sweep: Sweep, value: int) -> dict[str, int]:
    """The settings that a trial changes."""
    return {name: value for name in (sweep.parameter, *sweep.together)}


def run_sweep(
    sweep: Sweep,
    run_trial: Callable[[Mapping[str, int], Path], Mapping[str, float]],
    workspace: Path,
    *,
    values: Sequence[int] | None = None,
    concurrent: int = 1,
    cpus_per_trial: float = 0.1,
) -> dict[str, Any]:
    """Run a trial per value and write ``sweeps/<name>/sweep.json`` in the workspace; Ray must be connected.

    Args:
        sweep: the setting and its values.
        run_trial: ``(overrides, trial's workspace) -> figures`` from 0 to 1. It runs the pipeline in a process of Ray
            Tune, so it must be picklable.
        workspace: the parent's workspace, absolute, with prepared notes.
        values: replace the sweep's own values.
        concurrent: trials at once; the stages of each reserve their resources on top.
        cpus_per_trial: reserved for the process of a trial, which mostly waits for its stages.

    Returns:
        ``name, parameter, text, points``: per value, in order, ``value``, ``metrics`` (empty where it failed) and
        ``error`` (None, or the failure's last line).

    Raises:
        ConfigError: there are no values, or duplicates.
        OutputError: every trial failed.
    """
    from ray import tune

    chosen = tuple(values or sweep.values)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"sweep {sweep.name}: needs different values, got {list(chosen)}")
    home = Workspace(workspace).sweeps / sweep.name
    home.mkdir(parents=True, exist_ok=True)

    def trial(config: dict[str, Any]) -> None:
        import ray

        value = config["value"]
        # A task outside the trial's placement group, which lacks the CPUs and GPUs that the stages reserve.
        apart = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")(_run)
        work = apart.remote(run_trial, overrides(sweep, value), trial_workspace(workspace, sweep, value))
        tune.report({"figures": ray.get(work)})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus_per_trial}),
        param_space={"value": tune.grid_search(list(chosen))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name="trials", storage_path=str(home / "tune"), verbose=0),
    )
    grid = tuner.fit()
    points = [_point(grid[at]) for at in range(len(grid))]
    points.sort(key=lambda point: chosen.index(point["value"]))
    found = {"name": sweep.name, "parameter": sweep.parameter, "text": sweep.text, "points": points}
    write_atomically(home / "sweep.json", json.dumps(found, indent=1))
    if not any(point["metrics"] for point in points):
        raise OutputError(f"every trial of the sweep {sweep.name} failed, the first: {points[0]['error']}")
    return found


def _run(
    run_trial: Callable[[Mapping[str, int], Path], Mapping[str, float]], changed: Mapping[str, int], home: Path
) -> dict[str, float]:
    """Run a trial in this worker process, with its log on standard error, which Ray forwards."""
    logging.basicConfig(
        stream=sys.stderr, format=f"%(asctime)s {home.name}: %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("notellm2_ray").setLevel(logging.INFO)
    return dict(run_trial(changed, home))


def trial_workspace(workspace: Path, sweep: Sweep, value: int) -> Path:
    """Make a trial's workspace, with links to the parent's outputs that no sweep changes.

    A stage that finds a linked output made with other settings fails instead of overwriting it, so a trial never
    changes its parent.
    """
    home = Workspace(workspace).sweeps / sweep.name / f"{sweep.parameter.rsplit('.', 1)[-1]}-{value}"
    home.mkdir(parents=True, exist_ok=True)
    for place in (workspace, *workspace.glob("seeds/*")):
        for shared in filter(Path.is_dir, (place / name for name in _SHARED)):
            link = home / shared.relative_to(workspace)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(shared, target_is_directory=True)
    return home


def figures_of(results: Mapping[str, Any], method: str) -> dict[str, float]:
    """A ranker's main figures under the first protocol, from the results of an evaluation."""
    first = next(iter(results["protocols"].values()))
    figures = next(row["figures"]["all"] for row in first["rows"] if row["method"] == method)
    return {name: figures[name]["mean"] for name in METRICS if name in figures}


def _point(result: Any) -> dict[str, Any]:
    value = result.config["value"]
    error = str(result.error).strip().splitlines()[-1] if result.error else None
    if error:
        log.warning("the trial with value %s failed: %s", value, error)
    return {"value": value, "metrics": (result.metrics or {}).get("figures", {}), "error": error}
