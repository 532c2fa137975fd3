"""What a command would do, without doing it (`--dry-run`)."""

from __future__ import annotations

from pathlib import Path

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.stage import Planned
from notellm2_ray.pipeline.sweep_verb import SWEEP_VERB, sweep_size, sweep_stages
from notellm2_ray.pipeline.table import planned, run_of, stages_of


def dry_run(settings: Settings, verb: str) -> str:
    """The plan of ``verb``: the state of each output (done, to continue or to do), then work, resources and memory."""
    lines = [f"plan of `notellm2 {verb}`"]
    undone: set[Path] = set()
    outputs = _planned(settings, verb)
    width = max((len(one.label) for one in outputs), default=0)
    for one in outputs:
        state, done = _state(one, undone)
        if not done:
            undone.add(one.directory)
        lines.append(f"  {one.label:{width}s}  {state}")
    return "\n".join([*lines, *_sizes(settings, verb), *_memory(settings, verb)])


def _planned(settings: Settings, verb: str) -> list[Planned]:
    if verb == SWEEP_VERB:
        each = [(stage, one) for stage in sweep_stages(settings) for one in stage.in_a_run(settings)]
        return [output for stage, one in each for output in stage.outputs(one)]
    # Two embedders may be trained with the same negatives.
    return list({one.directory: one for _, one in planned(verb, settings)}.values())


def _state(one: Planned, undone: set[Path]) -> tuple[str, bool]:
    """The state of an output in words, and whether it is done."""
    if undone & set(one.reads.values()):
        return f"to do, after the stages before it ({one.directory})", False
    try:
        output = one.output()
    except OutputError:
        return f"to do, after the stages before it ({one.directory})", False
    if output.complete:
        return f"already there ({one.directory})", True
    return f"{'to continue' if output.resumable else 'to do'} ({one.directory})", False


def _sizes(settings: Settings, verb: str) -> list[str]:
    if verb == SWEEP_VERB:
        return [sweep_size(settings)]
    sizes = [stage.size(settings) for stage in stages_of(verb, settings) if stage.size is not None]
    return list(dict.fromkeys(sizes))


def _memory(settings: Settings, verb: str) -> list[str]:
    if verb == SWEEP_VERB:
        return []
    whole = run_of(verb) is not None
    found: dict[tuple[str, ...], None] = {}  # several steps use the same model
    for stage in stages_of(verb, settings):
        if stage.memory is not None:
            found |= dict.fromkeys(
                tuple(stage.memory(one)) for one in (stage.in_a_run(settings) if whole else (settings,))
            )
    return [line for lines in found for line in lines]
