"""What a stage is, and how it is run.

A stage is skipped if its output is complete, continued if it was stopped, and otherwise run from the start.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import MANIFEST, Output, read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace

log = logging.getLogger("notellm2_ray")


@dataclass(frozen=True)
class Planned:
    """An output that a stage will write, with everything that it depends on; inputs need not exist yet.

    Attributes:
        verb: the stage that writes it.
        directory: where it is written.
        settings: the settings that change it, as JSON values.
        reads: directories of the finished outputs that it needs, by name.
        reads_if_there: directories of outputs that it uses if they exist, by name.
        versions: versions of inputs from outside the workspace (source tables, model directories), by name.
        name: distinguishes the outputs of one stage, as in ``mllm_msr-seed42``; "" for a stage with one output.
    """

    verb: str
    directory: Path
    settings: Mapping[str, Any]
    reads: Mapping[str, Path] = field(default_factory=dict)
    reads_if_there: Mapping[str, Path] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """Its name in a dry run."""
        return f"{self.verb} {self.name}".strip()

    def output(self) -> Output:
        """The output with the fingerprints of its inputs.

        Raises:
            OutputError: an input is missing.
        """
        inputs = {name: fingerprint_of(directory) for name, directory in self.reads.items()}
        there = {name: path for name, path in self.reads_if_there.items() if (path / MANIFEST).is_file()}
        inputs |= {name: fingerprint_of(directory) for name, directory in there.items()}
        return Output(self.directory, self.verb, self.settings, inputs | dict(self.versions))

    @property
    def complete(self) -> bool:
        """Whether the output exists, is finished, and was made with these settings and inputs.

        Raises:
            OutputError: an input is missing.
        """
        return self.output().complete


def _once(settings: Settings) -> Iterable[Settings]:
    return (settings,)


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline, a row of the table in :mod:`notellm2_ray.pipeline.table`.

    Attributes:
        verb: its name on the command line.
        help: its help text on the command line.
        sections: the sections of the settings that it reads, beside those of the stages before it.
        needs: verbs of the stages whose outputs it reads.
        outputs: settings -> the outputs that it writes.
        work: settings -> runs the stage.
        in_a_run: settings of a whole run -> the settings to run the stage with: one for each embedder, say, or none if
            the run does not need it.
        also_needs: settings -> further verbs that it needs.
        size: settings -> one line for a dry run on the amount of work and the resources.
        memory: settings -> lines for a dry run on the memory that it needs.
    """

    verb: str
    help: str
    sections: tuple[str, ...]
    needs: tuple[str, ...]
    outputs: Callable[[Settings], Sequence[Planned]]
    work: Callable[[Settings], Any]
    in_a_run: Callable[[Settings], Iterable[Settings]] = _once
    also_needs: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    size: Callable[[Settings], str] | None = None
    memory: Callable[[Settings], list[str]] | None = None


def workspace_of(settings: Settings) -> Workspace:
    """The workspace of the settings; logs a warning if a submitted Ray job would lose it."""
    if os.environ.get("RAY_JOB_SUBMISSION_ID") and not settings.workspace.is_absolute():
        log.warning(
            "workspace %s is relative: a submitted job runs in a temporary copy of its working directory, and what "
            "it writes there is lost. Give an absolute workspace on shared storage",
            settings.workspace,
        )
    return Workspace(settings.workspace)


def fingerprint_of(directory: Path) -> str:
    """Fingerprint of a finished output.

    Raises:
        OutputError: there is none in ``directory``.
    """
    return read_manifest(directory)["fingerprint"]


def require(planned: Planned, advice: str) -> None:
    """Check that an output is complete.

    Raises:
        OutputError: it is not; the message ends with ``advice``.
    """
    try:
        there = planned.complete
    except OutputError:
        there = False
    if not there:
        raise OutputError(f"{planned.label} has not been made with these settings: {advice}")


def run_stage(planned: Planned | Output, work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Make an output of a stage unless it is complete.

    Args:
        planned: the output.
        work: writes into the given directory and returns the counts for the manifest.

    Returns:
        The manifest's counts.

    Raises:
        OutputError: an input is missing.
    """
    output = planned.output() if isinstance(planned, Planned) else planned
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
    planned: Sequence[Planned | Output], work: Callable[[Sequence[int], Sequence[Path]], Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Make several outputs of one stage with one call of ``work``; complete ones are skipped.

    Args:
        work: gets the positions in ``planned`` of the outputs to make, and their directories; returns counts for each.

    Returns:
        The counts of all of them.
    """
    outputs = [one.output() if isinstance(one, Planned) else one for one in planned]
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
