"""What a stage is, and running one.

A stage is skipped where its output is there, continued where it was stopped, and else done anew.
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
    """An output that a stage would write: what it is made of, whether or not that is there yet.

    Attributes:
        verb: the stage that writes it.
        directory: where it lies.
        settings: the settings that shape it, as JSON values.
        reads: name to directory of every finished output that it is made of.
        reads_if_there: the same for outputs that it can do without.
        versions: name to version of what comes from outside the workspace: source tables, model directories.
        name: tells it from the stage's other outputs, as in ``mllm_msr-seed42``; "" for a stage's only output.
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
        """As it stands in a dry run."""
        return f"{self.verb} {self.name}".strip()

    def output(self) -> Output:
        """The output with the fingerprints of what it is made of.

        Raises:
            OutputError: something that it reads is not there.
        """
        inputs = {name: fingerprint_of(directory) for name, directory in self.reads.items()}
        there = {name: path for name, path in self.reads_if_there.items() if (path / MANIFEST).is_file()}
        inputs |= {name: fingerprint_of(directory) for name, directory in there.items()}
        return Output(self.directory, self.verb, self.settings, inputs | dict(self.versions))

    @property
    def complete(self) -> bool:
        """Whether exactly this output is there.

        Raises:
            OutputError: something that it reads is not there.
        """
        return self.output().complete


def _once(settings: Settings) -> Iterable[Settings]:
    return (settings,)


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline, a row of the table in :mod:`notellm2_ray.pipeline.table`.

    Attributes:
        verb: its name on the command line.
        help: what it does, as the command line says it.
        sections: the sections of the settings that it reads beside those of the stages before it.
        needs: verbs of the stages whose outputs it reads.
        outputs: what it writes with given settings.
        work: does it with given settings.
        in_a_run: the settings with which a whole run does it: several where it makes several, none where nothing needs
            it.
        also_needs: further verbs that it needs with given settings.
        size: one line on how much it does and with what, for a dry run.
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


def workspace_of(settings: Settings) -> Workspace:
    """The workspace of the settings; warns where a submitted job would lose it."""
    if os.environ.get("RAY_JOB_SUBMISSION_ID") and not settings.workspace.is_absolute():
        log.warning(
            "workspace %s is relative: a submitted job runs in a temporary copy of its working directory, and what it "
            "writes there is lost; give an absolute workspace on shared storage",
            settings.workspace,
        )
    return Workspace(settings.workspace)


def fingerprint_of(directory: Path) -> str:
    """Fingerprint of a finished output.

    Raises:
        OutputError: there is none.
    """
    return read_manifest(directory)["fingerprint"]


def require(planned: Planned, advice: str) -> None:
    """Check that an output is there as planned.

    Raises:
        OutputError: it is not; the message ends in ``advice``.
    """
    try:
        there = planned.complete
    except OutputError:
        there = False
    if not there:
        raise OutputError(f"{planned.label} is not done with these settings: {advice}")


def run_stage(planned: Planned | Output, work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Do a stage's work unless its output is there.

    Args:
        planned: what it writes.
        work: writes into the directory it is given, and returns the counts for the manifest.

    Returns:
        The manifest's counts.

    Raises:
        OutputError: an output that it reads is not there.
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
    """Make several outputs of one stage in one go, but those that are there.

    Args:
        work: gets the places in ``planned`` of the outputs to make, and their directories; returns the counts of each.

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
