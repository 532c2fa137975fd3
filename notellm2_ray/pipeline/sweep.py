"""How the ranking changes with one setting (Figures 5 and 6 of MLLM-MSR): trials through Ray Tune.

A trial is the whole pipeline with that setting changed, in a workspace of its own below the parent's that shares what
the setting does not touch. Trials resume like any run: what a stopped sweep finished is not done again.
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

log = logging.getLogger("notellm2_ray")

METRICS = ("auc", "user_auc", "hr@5", "mrr@5")
_SHARED = ("prepared", "tiny", "tiny_mllm", "image_summaries")


class Sweep(NamedTuple):
    """A swept setting."""

    name: str  # directory and command-line name
    parameter: str  # dotted name in the settings
    values: tuple[int, ...]
    text: str
    together: tuple[str, ...] = ()  # settings that are set to the same value


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
            "Tokens of a preference, as written and as read by the ranker (the paper's Figure 6: flat from the third "
            "of five points on).",
            ("preferences.max_tokens",),
        ),
    )
}


def overrides(sweep: Sweep, value: int) -> dict[str, int]:
    """What a trial changes in the settings."""
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
        sweep: what is varied.
        run_trial: ``(overrides, its workspace) -> figures`` (shares from 0 to 1); runs the pipeline, in a Ray Tune
            trial's process, so it must pickle.
        workspace: the parent's, absolute, with prepared notes.
        values: others than the sweep's own.
        concurrent: trials at once; each also takes what its own stages reserve.
        cpus_per_trial: reserved for a trial's own process, which mostly waits for its stages.

    Returns:
        ``name, parameter, text, points``: per value, in order, ``value``, ``metrics`` (empty where it failed) and
        ``error`` (None, or the failure's last line).

    Raises:
        ConfigError: no values, or one twice; OutputError: every trial failed.
    """
    from ray import tune

    chosen = tuple(values or sweep.values)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ConfigError(f"sweep {sweep.name}: needs different values, got {list(chosen)}")
    home = workspace / "sweeps" / sweep.name
    home.mkdir(parents=True, exist_ok=True)

    def trial(config: dict[str, Any]) -> None:
        import ray

        value = config["value"]
        # Outside of the trial's placement group, which holds none of the CPUs and GPUs that its stages reserve.
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
    """A trial in a process of its own, whose log Ray forwards."""
    logging.basicConfig(
        stream=sys.stderr, format=f"%(asctime)s {home.name}: %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("notellm2_ray").setLevel(logging.INFO)
    return dict(run_trial(changed, home))


def trial_workspace(workspace: Path, sweep: Sweep, value: int) -> Path:
    """A trial's workspace, in which the parent's outputs that no sweep changes are linked.

    A stage that finds such an output made of other settings would write it anew; through a link it fails instead, so a
    trial never changes its parent.
    """
    home = workspace / "sweeps" / sweep.name / f"{sweep.parameter.rsplit('.', 1)[-1]}-{value}"
    home.mkdir(parents=True, exist_ok=True)
    for name in _SHARED:
        link = home / name
        if (workspace / name).is_dir() and not link.exists():
            link.symlink_to(workspace / name, target_is_directory=True)
    return home


def figures_of(results: Mapping[str, Any], method: str) -> dict[str, float]:
    """A ranker's main figures under the first protocol, of what an evaluation returned."""
    first = next(iter(results["protocols"].values()))
    figures = next(row["figures"]["all"] for row in first["rows"] if row["method"] == method)
    return {name: figures[name]["mean"] for name in METRICS if name in figures}


def _point(result: Any) -> dict[str, Any]:
    value = result.config["value"]
    error = str(result.error).strip().splitlines()[-1] if result.error else None
    if error:
        log.warning("the trial at %s failed: %s", value, error)
    return {"value": value, "metrics": (result.metrics or {}).get("figures", {}), "error": error}
