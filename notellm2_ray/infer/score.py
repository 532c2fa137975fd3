"""Scoring: P(yes) of every candidate, from one generated token, on a pool of Ray Data actors with one engine each."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core import errors
from notellm2_ray.core.candidate_rows import CandidateRows, store_notes
from notellm2_ray.core.config import shaping, to_plain
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.settings import GenerationSettings, RankerSettings
from notellm2_ray.core.settings.ranking import PromptLanguage
from notellm2_ray.infer.engine import engine_arguments, engine_environment
from notellm2_ray.infer.model_facts import ModelFacts, check_model
from notellm2_ray.infer.part_actors import make_parts
from notellm2_ray.infer.parts import PartStore
from notellm2_ray.infer.resources import check_engines
from notellm2_ray.infer.score_parts import CandidatePart, ScoredPart, compile_scores, plan_parts, scored_parts
from notellm2_ray.infer.score_questions import Controls, ScoreFiles
from notellm2_ray.infer.score_worker import PartScorer, ScoreJob, TableJob

log = logging.getLogger("notellm2_ray")

STAGE = "score-candidates"
MAX_BAD_SHARE = 0.05  # of candidates without a score: a table with more gaps allows no comparison


class ScoreTable(NamedTuple):
    """One table of scores to make: which users and candidates, which prompt, and what is exchanged as a control."""

    ranker: RankerSettings
    examples: Path  # EXAMPLE_SCHEMA
    candidates: Path  # CANDIDATE_SCHEMA
    preferences: Path | None  # PREFERENCE_SCHEMA; None for ``tallrec``
    output: Path  # directory; made if it does not exist
    controls: Controls = Controls()
    language: PromptLanguage = "en"  # of the prompts


class _Planned(NamedTuple):
    table: ScoreTable
    files: ScoreFiles
    rows: CandidateRows
    store: PartStore[ScoredPart]
    parts: list[CandidatePart]
    done: list[ScoredPart]
    reused: frozenset[str]

    @property
    def todo(self) -> list[CandidatePart]:
        return [part for part in self.parts if part.part_id not in self.reused]


def score_candidates(
    model: Path | str, generation: GenerationSettings, notes: Path, tables: Sequence[ScoreTable]
) -> list[dict[str, Any]]:
    """Score candidates with one model; writes ``scores.parquet`` into each table's output (SCORE_SCHEMA).

    A score is P(yes) / (P(yes) + P(no)) at the position of the answer's first token. Requests of one example follow
    each other, so that vLLM computes their common prefix once. The engines are started once for all tables. Each table
    is cut into resumable parts of whole examples (:mod:`~notellm2_ray.infer.parts`). A later run of the same job skips
    the parts that are there, so a killed engine or driver costs only the parts that were being scored.

    Ray must be connected. On several machines all paths must be on storage that all share.

    Args:
        model: directory (or hub name) of a Hugging Face model: a tuned ranker's ``model/``, or an untuned model.
        notes: prepared notes, a directory of Parquet files.
        tables: what to score, each with an output of its own.

    Returns:
        Counts for each table's manifest: examples, candidates, scored, quarantined, without_preference (examples with a
        history but no preference, treated as users without a history), parts, parts_reused, prompt_tokens,
        cached_tokens, computed_tokens; and for all tables together startup_seconds, score_seconds, candidates_per_s.

    Raises:
        ConfigError: the engines do not fit into the cluster, the settings contradict each other, or a prompt of texts
            and an image as large as they may be is too long for the engine.
        DataError: a table is unusable, or more than 5% of its candidates got no score.
        ModelError: the model reads no images, vLLM cannot run it, or its engines keep dying.
    """
    facts = check_model(model, images=any(table.ranker.variant != "tallrec" for table in tables))
    generation = for_scoring(generation)
    engine_arguments(facts, generation, images=1)  # raises now, before any work is done
    notes = Path(notes).absolute()
    shown_notes = Path(tables[0].output).absolute() / "notes.arrow"
    planned = [_plan(table, notes, shown_notes, facts, generation) for table in tables]
    jobs = tuple(
        TableJob(one.table.ranker, one.files, one.table.controls, one.table.output, one.table.language)
        for one in planned
    )
    todo = [part._replace(table=number) for number, one in enumerate(planned) for part in one.todo]
    total, known = sum(len(one.rows) for one in planned), sum(part.candidates for one in planned for part in one.done)
    by_output = {one.table.output: one for one in planned}
    first = 0
    with Progress(STAGE, "candidates", total, before=known, waits_for="the engine") as progress:
        if todo:
            _check_prompts(facts, generation, tables)
            shown_notes.unlink(missing_ok=True)
            store_notes(notes, set().union(*(_shown(one) for one in planned)), shown_notes)
            with closing(_run(ScoreJob(facts, generation, jobs), todo)) as results:  # on an error: ends the actors
                for output, part in results:
                    first = first or part.candidates
                    by_output[output].done.append(part)
                    progress.add(part.candidates)
                    _check_bad_share(by_output[output])
    for one in planned:
        _check_bad_share(one)
    shown_notes.unlink(missing_ok=True)
    # Start-up ends when the first part arrives. Its time is not counted, so its candidates are not either.
    active = progress.seconds - progress.startup_seconds
    together = {
        "startup_seconds": progress.startup_seconds,
        "score_seconds": progress.seconds,
        "candidates_per_s": round((progress.added - first) / active, 2) if active > 0 else None,
    }
    return [{**_counts(one), **together} for one in planned]


def _check_prompts(facts: ModelFacts, generation: GenerationSettings, tables: Sequence[ScoreTable]) -> None:
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.processors import load_processor
    from notellm2_ray.models.ranker.inputs import RankerPrompter
    from notellm2_ray.models.ranker.room import check_ranker

    processor = load_processor(facts.model)
    chat = ChatTokenizer.of(processor)
    for ranker, language in dict.fromkeys((table.ranker, table.language) for table in tables):
        check_ranker(RankerPrompter(chat, ranker, language), processor, facts.model, generation.max_model_len)


def _plan(
    table: ScoreTable, notes: Path, shown_notes: Path, facts: ModelFacts, generation: GenerationSettings
) -> _Planned:
    """A table cut into parts, with the records of the parts that are finished already."""
    examples, candidates, output = (Path(path).absolute() for path in (table.examples, table.candidates, table.output))
    preferences = table.preferences and Path(table.preferences).absolute()
    table = table._replace(examples=examples, candidates=candidates, preferences=preferences, output=output)
    engine = shaping(generation)
    versions = [_versions(path) for path in (examples, candidates, preferences, notes) if path]
    made_by = fingerprint(facts.fingerprint, [to_plain(table.ranker), table.language, engine, table.controls], versions)
    files = ScoreFiles(examples, candidates, preferences, shown_notes)
    rows = files.rows()
    parts = plan_parts(rows.example_of, 2 * generation.max_sequences, made_by)
    store = scored_parts(output)
    if removed := store.clear_leftovers([part.part_id for part in parts]):
        log.warning("%s: removed %d finished part(s) of another model, other settings or other inputs", STAGE, removed)
    if rows.without_preference:
        log.warning("%s: %d examples have a history but no preference", STAGE, rows.without_preference)
    done = [entry for part in parts if (entry := store.finished(part.part_id))]
    return _Planned(table, files, rows, store, parts, done, frozenset(entry.part_id for entry in done))


def _shown(planned: _Planned) -> set[str]:
    """Ids of the notes that a table's questions show."""
    rows, ranker = planned.rows, planned.table.ranker
    return set(rows.note_ids) | (rows.history_ids(ranker.max_history) if ranker.variant == "tallrec" else set())


def _counts(planned: _Planned) -> dict[str, Any]:
    done, rows = planned.done, planned.rows
    prompt_tokens, cached = sum(one.prompt_tokens for one in done), sum(one.cached_tokens for one in done)
    return {
        "examples": rows.num_examples,
        "candidates": len(rows),
        "scored": compile_scores(planned.store, planned.parts),
        "quarantined": sum(one.quarantined for one in done),
        "without_preference": rows.without_preference,
        "parts": len(planned.parts),
        "parts_reused": len(planned.reused),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached,
        "computed_tokens": prompt_tokens - cached,
    }


def for_scoring(generation: GenerationSettings) -> GenerationSettings:
    """The settings plus what scoring needs from an engine; the user's own ``engine_kwargs`` take precedence.

    Logits are computed in float32 whatever the model's type is. bfloat16 keeps 8 bits: logits above 8 then differ in
    steps of .06 and more, so that many of a user's candidates tie.
    """
    kwargs: dict[str, Any] = {"hf_overrides": {"head_dtype": "float32"}}
    return generation.model_copy(update={"engine_kwargs": {**kwargs, **generation.engine_kwargs}})


def _run(job: ScoreJob, parts: Sequence[CandidatePart]) -> Generator[tuple[Path, ScoredPart]]:
    """Score parts on the cluster; yields each one's output directory and record when it is finished, in any order.

    Raises:
        NoteLLMError, OSError: the error that stopped a part; the finished parts are kept.
    """
    generation = job.generation
    check_engines(STAGE, generation)
    return make_parts(
        PartScorer,
        job,
        parts,
        actors=generation.engines,
        cpus=generation.cpus_per_engine,
        gpus=generation.gpus_per_engine,
        environment=engine_environment(generation),
    )


def _check_bad_share(planned: _Planned) -> None:
    bad, total, store = sum(part.quarantined for part in planned.done), len(planned.rows), planned.store
    if bad > MAX_BAD_SHARE * total:
        seen = sum(part.candidates for part in planned.done)
        raise errors.DataError(
            f"{bad} of the first {seen} candidates ({total} in all) got no score, more than {MAX_BAD_SHARE:.0%}; "
            f"reasons: {'; '.join(store.first_reasons())}. All are in {store.quarantine}. "
            "Repair the notes, or run make-sequences again"
        )


def _versions(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of all Parquet files in a directory."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    return [(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.exists()]
