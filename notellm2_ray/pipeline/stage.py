"""Running a stage: skipped where its output is there, continued where it was stopped, else done anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from notellm2_ray.core.run import Output, read_manifest

log = logging.getLogger("notellm2_ray")


def run_stage(output: Output, work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Do a stage's work unless its output is there; its manifest's counts either way.

    Args:
        output: what the stage writes, with all that shapes it.
        work: writes into the directory it is given, and returns the manifest's counts.
    """
    name = f"{output.stage} ({output.directory.name})"
    if output.complete:
        log.info("%s: already there", name)
        return read_manifest(output.directory)["counts"]
    log.info("%s: %s", name, "continuing" if output.resumable else "starting")
    started = time.time()
    with output.write() as counts:
        counts.update(work(output.directory))
    log.info("%s: done in %.0f s: %s", name, time.time() - started, _brief(counts))
    return dict(counts)


def run_together(
    outputs: Sequence[Output], work: Callable[[Sequence[int], Sequence[Path]], Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Do the work of several outputs of one stage in one go, those left out that are there; the counts of each.

    Args:
        work: gets the places of the outputs to make and their directories, and returns the counts of each of these.
    """
    todo = [number for number, output in enumerate(outputs) if not output.complete]
    if there := len(outputs) - len(todo):
        log.info("%s: %d output(s) already there", outputs[0].stage, there)
    if todo:
        names = ", ".join("/".join(outputs[number].directory.parts[-2:]) for number in todo)
        log.info("%s: starting %s", outputs[0].stage, names)
        started = time.time()
        with ExitStack() as stack:
            counts = [stack.enter_context(outputs[number].write()) for number in todo]
            for one, found in zip(counts, work(todo, [outputs[number].directory for number in todo]), strict=True):
                one.update(found)
                log.info("%s: %s", outputs[0].stage, _brief(found))
        log.info("%s: done in %.0f s", outputs[0].stage, time.time() - started)
    return [read_manifest(output.directory)["counts"] for output in outputs]


def _brief(counts: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in counts.items() if isinstance(value, (int, float, str))}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
