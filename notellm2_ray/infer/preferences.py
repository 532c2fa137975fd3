"""User summaries: every user's history to a taste in words, block by block, on actors with one vLLM engine each."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core import errors
from notellm2_ray.core.config import to_plain
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.prompts import Language
from notellm2_ray.core.recommend_prompts import preference_prompt
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.schema import PREFERENCE_SCHEMA, QUARANTINE_SCHEMA
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.infer.engine import check_model, engine_arguments
from notellm2_ray.infer.preference_log import LogIndex
from notellm2_ray.infer.preference_plan import Chain, Chains, describe, plan_chains, read_summaries, read_titles
from notellm2_ray.infer.preference_pool import EnginePool
from notellm2_ray.infer.preference_worker import Job, Work
from notellm2_ray.infer.resources import check_engines

log = logging.getLogger("notellm2_ray")

STAGE = "summarize-preferences"
_NOT_SHAPING = ("concurrent_calls", "model")
_ENGINE_SHAPING = ("dtype", "max_model_len", "engine_kwargs")


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
    """Summarise users' histories into ``output/preferences.parquet`` (PREFERENCE_SCHEMA, by user and block).

    MLLM-MSR's user summariser: P_b = LLM(P_{b-1}, block b). Each user's chain advances as soon as its own previous
    block is done, longest chains first; there is no barrier between users. Each finished step is a line of a log
    (:mod:`~notellm2_ray.infer.preference_log`) before the next begins. A killed actor or driver thus loses the calls
    that were in flight, and a later run goes on from the logs. A step is known by a hash of the model, the settings and
    all text that went into it and into the steps before it: a history that grew by a block costs one call, and a
    changed one is made anew from where it changed.

    Ray must be connected. On several machines the model and ``output`` lie on storage that they all share.

    Args:
        model: directory or hub name of an LLM or MLLM that vLLM runs.
        blocks: BLOCK_SCHEMA.
        notes: prepared notes (file or directory), or titles by note id.
        summaries: SUMMARY_SCHEMA; None, or ``no_image_summary``: titles alone.
        output: directory; exists, or is made.
        language: of the prompts.
        seed: of sampling, where the temperature is above 0.
        needed: Parquet of (user_id, block) that will be read; see :func:`~.preference_plan.plan_chains`.
        logs: directory of the logs, ``output`` unless they are to outlive it.

    Returns:
        Counts for the manifest: users, preferences, reused, calls, cut, quarantined, dropped_items, missing_notes,
        items_without_summary, prompt_tokens, generated_tokens, startup_seconds, generate_seconds.

    Raises:
        ConfigError: the engines do not fit into the cluster, or the settings contradict each other.
        DataError: an input is unfit; names file and row.
        ModelError: vLLM cannot run the model, or its engines keep dying.
    """
    output, logs = Path(output).absolute(), Path(logs or output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    facts = check_model(model, images=False)
    engine_arguments(facts, generation)
    preference_prompt(language, settings.variant, None, [], settings.template)  # a wrong template is known at once
    made_by = fingerprint(facts.fingerprint, _shaping(settings, generation, language, seed))
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
    work = rest_of(plan.chains, index)
    reused = total - _steps(work)
    times = _advance(Job(facts, logs, settings, generation, language, seed), work, index, total, reused)
    counts = _compile(plan, index, output)
    return {**describe(plan), "reused": reused, **counts, **times}


def rest_of(chains: Sequence[Chain], index: LogIndex) -> list[Work]:
    """What no log holds yet, longest chains first: the longest is what everybody waits for in the end."""
    index.refresh()
    works: list[Work] = []
    for chain in chains:
        done = 0
        while done < len(chain.steps) and chain.steps[done].key in index:
            done += 1
        if done < len(chain.steps):
            previous = index[chain.steps[done - 1].key]["preference"] if done else None
            works.append(Work(Chain(chain.user, chain.steps[done:]), previous))
    works.sort(key=lambda work: (-len(work.chain.steps), -sum(len(step.items) for step in work.chain.steps)))
    return works


def _advance(job: Job, work: list[Work], index: LogIndex, total: int, reused: int) -> dict[str, float]:
    waits_for = "the engines and the first users"
    with Progress(STAGE, "preferences", total, before=reused, waits_for=waits_for) as progress:
        started = time.monotonic()
        startup = 0.0
        if work:
            check_engines(STAGE, job.generation)
            with EnginePool(job) as pool:
                startup = time.monotonic() - started
                _drive(pool, deque(work), index, progress)
    return {
        "startup_seconds": round(startup, 3),
        "generate_seconds": round(time.monotonic() - started - startup, 3),
    }


def _drive(pool: EnginePool, waiting: deque[Work], index: LogIndex, progress: Progress) -> None:
    """Keep every engine supplied until nothing waits and nothing is under way."""
    while waiting or pool.busy:
        while waiting and (room := pool.room()):
            pool.submit([waiting.popleft() for _ in range(min(room, len(waiting)))])
        for works, done in pool.finished():
            if done is not None:
                progress.add(done.steps, tokens=done.generated_tokens)
                continue
            # Its actor died: what it had logged is not asked for again.
            if index.refresh():
                pool.progressed()
            again = rest_of([work.chain for work in works], index)
            progress.add(_steps(works) - _steps(again))
            # A chain whose first steps are not in the log begins where it began before.
            began = {work.chain.steps[0].key: work.previous for work in works}
            waiting.extendleft(
                work._replace(previous=began.get(work.chain.steps[0].key, work.previous)) for work in again
            )


def _steps(works: Sequence[Work]) -> int:
    return sum(len(work.chain.steps) for work in works)


def _compile(plan: Chains, index: LogIndex, output: Path) -> dict[str, int]:
    """Write preferences.parquet and the quarantine; counts over all preferences, reused ones included."""
    index.refresh()
    ordered = sorted((chain.user, step.block, step.key) for chain in plan.chains for step in chain.steps)
    lost = [key for _, _, key in ordered if key not in index]
    if lost:
        raise errors.OutputError(
            f"{len(lost)} preference(s) were made but are not in the logs under {index.directory}: on several machines "
            "the workspace must lie on storage that all of them share"
        )
    counts = dict.fromkeys(("calls", "cut", "dropped_items", "prompt_tokens", "generated_tokens"), 0)
    quarantined = [
        {
            "table": "notes",
            "source": "histories",
            "key": note_id,
            "reason": f"in {times} histories, but in no notes table",
        }
        for note_id, times in plan.missing_notes.items()
    ]
    rows: list[dict[str, Any]] = []
    temporary = output / f".preferences.{uuid.uuid4().hex[:8]}.partial"
    with open(temporary, "wb") as file:
        with pq.ParquetWriter(file, PREFERENCE_SCHEMA) as writer:
            for record in index.read([key for _, _, key in ordered]):
                rows.append({**record, "user_id": record["user"]})
                counts["dropped_items"] += record["dropped"]
                for name in ("calls", "cut", "prompt_tokens", "generated_tokens"):
                    counts[name] += record[name]
                if record["problem"]:
                    source = f"user {record['user']!r}, block {record['block']}"
                    reason = {"key": record["user"], "reason": record["problem"]}
                    quarantined.append({"table": "blocks", "source": source, **reason})
                if len(rows) == 10_000:
                    writer.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_SCHEMA))
                    rows.clear()
            writer.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_SCHEMA))
        file.flush()
        os.fsync(file.fileno())
    (output / "quarantine").mkdir(exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(quarantined, schema=QUARANTINE_SCHEMA), output / "quarantine" / "blocks.parquet"
    )
    os.replace(temporary, output / "preferences.parquet")
    return {**counts, "quarantined": len(quarantined)}


def _shaping(settings: PreferenceSettings, generation: GenerationSettings, language: str, seed: int) -> dict[str, Any]:
    """Everything but the histories that a preference depends on."""
    plain = {name: value for name, value in to_plain(settings).items() if name not in _NOT_SHAPING}
    engine = {name: value for name, value in to_plain(generation).items() if name in _ENGINE_SHAPING}
    words = preference_prompt(language, settings.variant, None, [], settings.template)  # type: ignore[arg-type]
    # Greedy answers depend on the seed only in the second try after an empty one.
    return {**plain, **engine, "language": language, "words": repr(words), "seed": seed if settings.temperature else 0}
