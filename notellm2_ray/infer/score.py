"""Scoring: P(yes) of every candidate by one forced token, on a pool of Ray Data actors with a vLLM engine each."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from notellm2_ray.core import errors
from notellm2_ray.core.config import to_plain
from notellm2_ray.core.ranking_rows import CandidateRows, store_notes
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.settings import GenerationSettings, RankerSettings
from notellm2_ray.infer.engine import ModelFacts, check_model, engine_arguments, engine_environment
from notellm2_ray.infer.progress import Progress
from notellm2_ray.infer.ray_data import own_context
from notellm2_ray.infer.resources import check_engines
from notellm2_ray.infer.score_parts import (
    Part,
    Scored,
    clear_leftovers,
    compile_scores,
    first_reasons,
    plan_parts,
    read_scored,
)
from notellm2_ray.infer.score_questions import Controls, ScoreFiles
from notellm2_ray.infer.score_worker import CALLS_AT_ONCE, PartScorer, ScoreJob, TableJob

log = logging.getLogger("notellm2_ray")

STAGE = "score-candidates"
MAX_BAD_SHARE = 0.05  # of the candidates without a score; a table with more holes compares nothing
_ENGINE_SHAPING = ("dtype", "max_model_len", "engine_kwargs")
_MAX_RAY_BLOCKS = 20_000


class ScoreTable(NamedTuple):
    """One table of scores to make: who is asked about which candidates, how, and with what exchanged."""

    ranker: RankerSettings
    examples: Path  # EXAMPLE_SCHEMA
    candidates: Path  # CANDIDATE_SCHEMA
    preferences: Path | None  # PREFERENCE_SCHEMA; None for ``tallrec``
    output: Path  # directory; exists, or is made
    controls: Controls = Controls()


class _Planned(NamedTuple):
    table: ScoreTable
    files: ScoreFiles
    rows: CandidateRows
    parts: list[Part]
    done: list[Scored]
    reused: frozenset[str]

    @property
    def todo(self) -> list[Part]:
        return [part for part in self.parts if part.part_id not in self.reused]


def score_candidates(
    model: Path | str, generation: GenerationSettings, notes: Path, tables: Sequence[ScoreTable]
) -> list[dict[str, Any]]:
    """Score candidates with one model into ``scores.parquet`` of each table's output (SCORE_SCHEMA).

    A score is P(yes) / (P(yes) + P(no)) at the place of the answer's first token. Requests of one example follow each
    other, so that vLLM computes what they share once; an engine is started once for all tables. Parts of whole examples
    are committed one by one (``parts`` in the output); a later run of the same job skips those that are there, so that
    a killed engine or driver costs the parts in hand.

    Ray must be connected. On several machines all paths lie on storage that they share.

    Args:
        model: directory (or hub name) of a Hugging Face model: a tuned ranker's ``model/``, or an untuned one.
        notes: prepared notes, a directory of Parquet files.
        tables: what to score, each with an output of its own.

    Returns:
        Counts for each table's manifest: examples, candidates, scored, quarantined, without_preference (examples with a
        history but no preference, shown as users without a history), parts, parts_reused, prompt_tokens, cached_tokens,
        computed_tokens; and, of all tables together, startup_seconds, score_seconds, candidates_per_s.

    Raises:
        ConfigError: the engines do not fit into the cluster, or the settings contradict each other.
        DataError: a table is unusable, or more than 5% of its candidates got no score.
        ModelError: the model sees no images, vLLM cannot run it, or its engines keep dying.
    """
    facts = check_model(model, images=any(table.ranker.variant != "tallrec" for table in tables))
    generation = for_scoring(generation)
    engine_arguments(facts, generation, images=1)  # fails at once if it must
    notes = Path(notes).absolute()
    store = Path(tables[0].output).absolute() / "notes.arrow"
    planned = [_plan(table, notes, store, facts, generation) for table in tables]
    jobs = tuple(TableJob(one.table.ranker, one.files, one.table.controls, one.table.output) for one in planned)
    todo = [part._replace(table=number) for number, one in enumerate(planned) for part in one.todo]
    total, known = sum(len(one.rows) for one in planned), sum(_seen(entry) for one in planned for entry in one.done)
    first = 0
    with Progress(total, known, stage=STAGE, unit="candidates", waits_for="the engine") as progress:
        if todo:
            store.unlink(missing_ok=True)
            store_notes(notes, set().union(*(_shown(one) for one in planned)), store)
            with closing(_run(ScoreJob(facts, generation, jobs), todo)) as results:  # closed at once: it holds actors
                for number, entry in results:
                    first = first or _seen(entry)
                    planned[number].done.append(entry)
                    progress.add(_seen(entry))
                    _check_bad_share(planned[number])
    for one in planned:
        _check_bad_share(one)
    store.unlink(missing_ok=True)
    seconds = progress.seconds()
    # The first part's arrival ends the start-up; it is not in the time, so neither are its candidates in the rate.
    active = seconds["embed_seconds"] - seconds["startup_seconds"]
    together = {
        "startup_seconds": seconds["startup_seconds"],
        "score_seconds": seconds["embed_seconds"],
        "candidates_per_s": round((progress.added - first) / active, 2) if active > 0 else None,
    }
    return [{**_counts(one), **together} for one in planned]


def _plan(table: ScoreTable, notes: Path, store: Path, facts: ModelFacts, generation: GenerationSettings) -> _Planned:
    """A table cut into parts, with those that are done already."""
    examples, candidates, output = (Path(path).absolute() for path in (table.examples, table.candidates, table.output))
    preferences = table.preferences and Path(table.preferences).absolute()
    table = table._replace(examples=examples, candidates=candidates, preferences=preferences, output=output)
    kept = {name: to_plain(generation)[name] for name in _ENGINE_SHAPING}
    versions = [_versions(path) for path in (examples, candidates, preferences, notes) if path]
    made_by = fingerprint(facts.fingerprint, [to_plain(table.ranker), kept, table.controls], versions)
    files = ScoreFiles(examples, candidates, preferences, store)
    rows = files.rows()
    parts = plan_parts(rows.example_of, 2 * generation.max_sequences, made_by)
    if removed := clear_leftovers(output, parts):
        log.warning("%s: removed %d part(s) of another model, other settings or other inputs", STAGE, removed)
    if rows.without_preference:
        log.warning("%s: %d examples have a history but no preference", STAGE, rows.without_preference)
    done = [entry for part in parts if (entry := read_scored(output, part.part_id))]
    return _Planned(table, files, rows, parts, done, frozenset(entry.part_id for entry in done))


def _shown(planned: _Planned) -> set[str]:
    """The notes that a table's questions show."""
    rows, ranker = planned.rows, planned.table.ranker
    return set(rows.note_ids) | (rows.history_ids(ranker.max_history) if ranker.variant == "tallrec" else set())


def _counts(planned: _Planned) -> dict[str, Any]:
    done, rows = planned.done, planned.rows
    prompt_tokens, cached = sum(one.prompt_tokens for one in done), sum(one.cached_tokens for one in done)
    return {
        "examples": rows.num_examples,
        "candidates": len(rows),
        "scored": compile_scores(planned.table.output, planned.parts),
        "quarantined": sum(one.quarantined for one in done),
        "without_preference": rows.without_preference,
        "parts": len(planned.parts),
        "parts_reused": len(planned.reused),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached,
        "computed_tokens": prompt_tokens - cached,
    }


def for_scoring(generation: GenerationSettings) -> GenerationSettings:
    """The settings with what scoring asks of an engine beyond them; the user's own ``engine_kwargs`` come first.

    Logits are computed in float32 whatever the model is: bfloat16 keeps 8 bits of them, which leaves steps of .06 and
    more between logits of 10 and over, and so ties between many of a user's candidates.
    """
    kwargs: dict[str, Any] = {"hf_overrides": {"head_dtype": "float32"}}
    return generation.model_copy(update={"engine_kwargs": {**kwargs, **generation.engine_kwargs}})


def _run(job: ScoreJob, parts: Sequence[Part]) -> Generator[tuple[int, Scored]]:
    """Score parts on the cluster; yields the place of its table and each as it gets done, in any order.

    Raises:
        NoteLLMError, OSError: what stopped a part; the parts that are done stay.
    """
    import ray

    check_engines(STAGE, job.generation)
    size = min(job.generation.engines, len(parts))
    with own_context():
        rows = ray.data.from_items(
            [part._asdict() for part in parts], override_num_blocks=min(len(parts), _MAX_RAY_BLOCKS)
        )
        reports = rows.map_batches(
            PartScorer,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=size,
                max_concurrent_calls_per_actor=CALLS_AT_ONCE,
                max_tasks_in_flight_per_actor=CALLS_AT_ONCE + 1,
                enable_true_multi_threading=True,
            ),
            num_cpus=job.generation.cpus_per_engine,
            num_gpus=job.generation.gpus_per_engine,
            runtime_env={"env_vars": engine_environment(job.generation)},
        )
        for batch in reports.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(batch, pa.Table)
            for row in batch.to_pylist():
                yield row["table"], _scored(row)


def _scored(row: Mapping[str, Any]) -> Scored:
    if row["error"] == "OSError":
        raise OSError(row["errno"], row["message"])
    if row["error"] is not None:
        raise getattr(errors, row["error"])(row["message"])
    return Scored(*(row[name] for name in Scored._fields))


def _seen(entry: Scored) -> int:
    return entry.scored + entry.quarantined


def _check_bad_share(planned: _Planned) -> None:
    bad, total, output = sum(entry.quarantined for entry in planned.done), len(planned.rows), planned.table.output
    if bad > MAX_BAD_SHARE * total:
        raise errors.DataError(
            f"{bad} of the first {sum(map(_seen, planned.done))} candidates ({total} in all) got no score, more than "
            f"{MAX_BAD_SHARE:.0%}; reasons: {'; '.join(first_reasons(output))}. All are in {output / 'quarantine'}. "
            "Repair the notes, or make the sequences again"
        )


def _versions(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of all Parquet files of a directory."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    return [(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.exists()]
