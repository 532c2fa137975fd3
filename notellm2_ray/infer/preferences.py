"""Preferences: every user's history becomes a taste in words, block by block, on actors with one vLLM engine each."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core import errors
from notellm2_ray.core.config import shaping
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.prompts import Language
from notellm2_ray.core.recommend_prompts import preference_prompt
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.schema import PREFERENCE_SCHEMA, QUARANTINE_SCHEMA
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.infer.engine import engine_arguments
from notellm2_ray.infer.model_facts import check_model
from notellm2_ray.infer.parts import QUARANTINE, whole_file, write_whole_parquet
from notellm2_ray.infer.preference_log import LogIndex
from notellm2_ray.infer.preference_plan import Chain, ChainPlan, plan_chains, plan_counts, read_summaries, read_titles
from notellm2_ray.infer.preference_pool import EnginePool
from notellm2_ray.infer.preference_steps import check_room
from notellm2_ray.infer.preference_worker import PendingChain, PreferenceJob
from notellm2_ray.infer.resources import check_engines

log = logging.getLogger("notellm2_ray")

STAGE = "summarize-preferences"
_ROWS_PER_GROUP = 10_000
_SUMS = ("calls", "cut", "looped", "unchanged", "dropped_items", "prompt_tokens", "generated_tokens")
_LOOPS_TO_MENTION = 0.05  # share of answers
_UNCHANGED_TO_MENTION = 0.5  # share of revisions


def summarize_preferences(
    model: Path | str,
    blocks: Path,
    notes: Path | Mapping[str, str],
    summaries: Path | None,
    output: Path,
    settings: PreferenceSettings,
    generation: GenerationSettings,
    language: Language,
    *,
    seed: int,
    needed: Path | None = None,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Summarise users' histories in ``output/preferences.parquet`` (PREFERENCE_SCHEMA, ordered by user and block).

    MLLM-MSR's user summariser: P_b = LLM(P_{b-1}, block b). Each user's chain advances as soon as its own previous
    block is done, the longest chains first; there is no barrier between users. Each finished step is written to a log
    (:mod:`~notellm2_ray.infer.preference_log`) before the next one begins. A killed actor or driver thus costs only the
    calls that were running, and a later run continues from the logs. The key of a step is a hash of the model, the
    settings and all text that went into it and the steps before it. So a history that grew by a block costs one call,
    and a history that changed is summarised again from the change on.

    Ray must be connected. On several machines the model and ``output`` must be on storage that all share.

    Args:
        model: directory or hub name of an LLM or MLLM that vLLM runs.
        blocks: BLOCK_SCHEMA.
        notes: prepared notes (file or directory), or titles by note id.
        summaries: SUMMARY_SCHEMA; None to show titles alone. Not read for the variant ``no_image_summary``.
        output: directory; made if it does not exist.
        language: of the prompts.
        seed: of sampling, if the temperature is above 0.
        needed: Parquet of the (user_id, block) that will be read; see :func:`~.preference_plan.plan_chains`.
        logs: directory of the logs; ``output`` by default. Give another one if the logs are to outlive ``output``.

    Returns:
        Counts for the manifest: users, preferences, reused, calls, cut, looped (answers that repeated themselves),
        unchanged (revisions that equal the preference before), quarantined, dropped_items, missing_notes,
        items_without_summary, prompt_tokens, generated_tokens, startup_seconds, generate_seconds.

    Raises:
        ConfigError: the engines do not fit into the cluster, no prompt fits into an engine, or the settings contradict
            each other.
        DataError: an input is unusable; the message names the file and the row.
        ModelError: vLLM cannot run the model, or its engines keep dying.
    """
    output, logs = Path(output).absolute(), Path(logs or output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    facts = check_model(model, images=False)
    from notellm2_ray.models.chat import ChatTokenizer

    engine_arguments(facts, generation)
    preference_prompt(language, settings.variant, None, [], settings.template)  # raises now if the template is wrong
    made_by = fingerprint(facts.fingerprint, _shaped_by(settings, generation, language, seed))
    plan = plan_chains(
        blocks,
        notes if isinstance(notes, Mapping) else read_titles(notes),
        None if summaries is None else read_summaries(summaries),
        settings,
        made_by,
        needed,
    )
    index = LogIndex(logs)
    total = sum(len(chain.steps) for chain in plan.chains)
    pending = rest_of(plan.chains, index)
    if pending:
        check_room(ChatTokenizer.from_pretrained(facts.model), settings, generation, language)
    reused = total - _steps(pending)
    times = _advance(PreferenceJob(facts, logs, settings, generation, language, seed), pending, index, total, reused)
    counts = _compile(plan, index, output)
    _warn(counts, total, total - len(plan.chains))
    return {**plan_counts(plan), "reused": reused, **counts, **times}


def _warn(counts: Mapping[str, int], total: int, revisions: int) -> None:
    if counts["looped"] > _LOOPS_TO_MENTION * total:
        log.warning("%s: %d of %d answers repeated themselves, which was cut", STAGE, counts["looped"], total)
    if counts["unchanged"] > _UNCHANGED_TO_MENTION * revisions:
        log.warning(
            "%s: %d of %d revisions equal the preference before them, word for word. If tastes do change, the model "
            "copies instead of revising: try a larger one, or preferences.variant=direct",
            *(STAGE, counts["unchanged"], revisions),
        )


def rest_of(chains: Sequence[Chain], index: LogIndex) -> list[PendingChain]:
    """The chains' unfinished steps, longest chains first, because the longest one decides when the job ends."""
    index.refresh()
    pending: list[PendingChain] = []
    for chain in chains:
        done = 0
        while done < len(chain.steps) and chain.steps[done].key in index:
            done += 1
        if done < len(chain.steps):
            previous = index[chain.steps[done - 1].key]["preference"] if done else None
            pending.append(PendingChain(Chain(chain.user, chain.steps[done:]), previous))
    pending.sort(key=lambda one: (-len(one.chain.steps), -sum(len(step.items) for step in one.chain.steps)))
    return pending


def _advance(
    job: PreferenceJob, pending: list[PendingChain], index: LogIndex, total: int, reused: int
) -> dict[str, float]:
    waits_for = "the engines and the first users"
    with Progress(STAGE, "preferences", total, before=reused, waits_for=waits_for) as progress:
        started = time.monotonic()
        startup = 0.0
        if pending:
            check_engines(STAGE, job.generation)
            with EnginePool(job) as pool:
                startup = time.monotonic() - started
                _drive(pool, deque(pending), index, progress)
    return {
        "startup_seconds": round(startup, 3),
        "generate_seconds": round(time.monotonic() - started - startup, 3),
    }


def _drive(pool: EnginePool, waiting: deque[PendingChain], index: LogIndex, progress: Progress) -> None:
    """Keep every engine supplied until no chain is waiting or running."""
    while waiting or pool.busy:
        while waiting and (room := pool.room()):
            pool.submit([waiting.popleft() for _ in range(min(room, len(waiting)))])
        for pending, done in pool.finished():
            if done is not None:
                progress.add(done.steps, tokens=done.generated_tokens)
                continue
            # The actor of these chains died. The steps that it logged are not repeated.
            if index.refresh():
                pool.progressed()
            again = rest_of([one.chain for one in pending], index)
            progress.add(_steps(pending) - _steps(again))
            # A chain of which nothing was logged keeps the preference that it began with.
            began = {one.chain.steps[0].key: one.previous for one in pending}
            waiting.extendleft(one._replace(previous=began.get(one.chain.steps[0].key, one.previous)) for one in again)


def _steps(chains: Sequence[PendingChain]) -> int:
    return sum(len(one.chain.steps) for one in chains)


def _compile(plan: ChainPlan, index: LogIndex, output: Path) -> dict[str, int]:
    """Write preferences.parquet and the quarantine; returns counts over all preferences, reused ones included."""
    index.refresh()
    ordered = sorted((chain.user, step.block, step.key) for chain in plan.chains for step in chain.steps)
    lost = [key for _, _, key in ordered if key not in index]
    if lost:
        raise errors.OutputError(
            f"{len(lost)} preference(s) were made but are not in the logs under {index.directory}: on several machines "
            "the workspace must be on storage that all of them share"
        )
    quarantined = [
        _lost("notes", "histories", note_id, f"in {times} histories, but in no notes table")
        for note_id, times in plan.missing_notes.items()
    ]
    with whole_file(output / "preferences.parquet") as file:
        counts, problems = _write_preferences(file, index.read([key for _, _, key in ordered]))
        quarantined += problems
        (output / QUARANTINE).mkdir(exist_ok=True)
        table = pa.Table.from_pylist(quarantined, schema=QUARANTINE_SCHEMA)
        write_whole_parquet(output / QUARANTINE / "blocks.parquet", table)
    return {**counts, "quarantined": len(quarantined)}


def _write_preferences(
    file: IO[bytes], records: Iterable[dict[str, Any]]
) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Write records as PREFERENCE_SCHEMA; returns their sums, and a quarantine row for each record with a problem."""
    counts = dict.fromkeys(_SUMS, 0)
    problems: list[dict[str, str]] = []
    rows: list[dict[str, Any]] = []
    before = ("", "")  # user and preference of the block before
    with pq.ParquetWriter(file, PREFERENCE_SCHEMA) as writer:
        for record in records:
            user, block = record["user"], record["block"]
            rows.append({**record, "user_id": user})
            counts["unchanged"] += before == (user, record["preference"])
            before = user, record["preference"]
            counts["dropped_items"] += record["dropped"]
            counts["looped"] += record.get("looped", False)  # not in logs of earlier versions
            for name in ("calls", "cut", "prompt_tokens", "generated_tokens"):
                counts[name] += record[name]
            if record["problem"]:
                problems.append(_lost("blocks", f"user {user!r}, block {block}", user, record["problem"]))
            if len(rows) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_SCHEMA))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_SCHEMA))
    return counts, problems


def _lost(table: str, source: str, key: str, reason: str) -> dict[str, str]:
    return {"table": table, "source": source, "key": key, "reason": reason}


def _shaped_by(
    settings: PreferenceSettings, generation: GenerationSettings, language: str, seed: int
) -> dict[str, Any]:
    """Everything that a preference depends on, except the histories and the model."""
    # The model itself is in its fingerprint, wherever it lies.
    shaped_by = {name: value for name, value in shaping(settings).items() if name != "model"}
    words = preference_prompt(language, settings.variant, None, [], settings.template)  # type: ignore[arg-type]
    # A greedy answer depends on the seed only if it is the second one, after an empty answer.
    return {
        **shaped_by,
        **shaping(generation),
        "language": language,
        "words": repr(words),
        "seed": seed if settings.temperature else 0,
    }
