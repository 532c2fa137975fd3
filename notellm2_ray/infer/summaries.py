"""Image summaries: a description in words of every note's image, through Ray Data's own vLLM stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notellm2_ray.core import errors
from notellm2_ray.core.config import shaping
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.prompts import Language
from notellm2_ray.core.recommend_prompts import summary_prompt
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.settings import GenerationSettings, SummarySettings
from notellm2_ray.infer.answers import cut_at_sentence
from notellm2_ray.infer.chunks import list_note_files, note_ids, plan_chunks, read_ids
from notellm2_ray.infer.engine import engine_arguments
from notellm2_ray.infer.model_facts import ModelFacts, check_model
from notellm2_ray.infer.summary_parts import Described, commit, compile_summaries, described_parts, read_described
from notellm2_ray.infer.summary_pipeline import STAGE, SummaryJob, run
from notellm2_ray.infer.summary_rows import ASKED, ERROR, NO_IMAGE, cleaned, problem_of

if TYPE_CHECKING:
    from notellm2_ray.models.chat import ChatTokenizer

log = logging.getLogger("notellm2_ray")


def summarize_images(
    model: Path | str,
    notes: Path,
    output: Path,
    settings: SummarySettings,
    generation: GenerationSettings,
    language: Language,
    *,
    only_ids: Path | None = None,
) -> dict[str, Any]:
    """Describe the images of a notes table in ``output/summaries.parquet`` (SUMMARY_SCHEMA, in the order of note ids).

    A ``ray.data.llm`` pipeline. The prompt is the same for all images and is tokenised once, so only Ray's engine stage
    runs; its chat, tokenise and detokenise stages are off. Each batch that leaves the engine becomes a part on disk at
    once (``output/parts``), and a later run describes only the rest. A killed actor or driver thus costs the batches
    that were in the engine. If an answer is empty or repetitive, the model is asked once more; a second such answer is
    quarantined. So are notes without an image, with an unusable image, or for which the engine fails.

    Ray must be connected. On several machines ``notes``, the model and ``output`` must be on storage that all share.

    Args:
        model: directory or hub name of an image-text model that vLLM runs.
        notes: prepared notes: Parquet file, directory, glob or object-store URI.
        output: directory; made if it does not exist.
        language: of the prompt.
        only_ids: Parquet file with a ``note_id`` column: describe only these.

    Returns:
        Counts for the manifest: notes, summaries, reused, retried, quarantined, without_image, unknown_ids,
        prompt_tokens, generated_tokens, startup_seconds, generate_seconds.

    Raises:
        ConfigError: the engines do not fit into the cluster, or the settings contradict each other.
        DataError: an input is unusable, or more images are quarantined than ``max_bad_share`` allows.
        ModelError: the model reads no images, or vLLM cannot run it.
    """
    output = Path(output).absolute()
    facts = check_model(model, images=True)
    job, wanted, unknown = _plan(facts, notes, output, settings, generation, language, only_ids)
    store, versions = described_parts(output), set(job.versions.values())
    done, removed = read_described(store, versions)
    if removed:
        log.warning("%s: removed %d finished part(s) of another model, other settings or other notes", STAGE, removed)
    reused = len(done.ids)
    todo = wanted - done.ids
    with Progress(STAGE, "images", job.total, before=reused, waits_for="the engine") as progress:
        retried = _describe(job, todo, done, progress)
    _check_bad_share(job, done)
    table = compile_summaries(store, versions)
    return {
        "notes": job.total,
        "summaries": len(table),
        "reused": reused,
        "retried": retried,
        "quarantined": len(done.quarantined),
        "without_image": len(done.without_image),
        "unknown_ids": unknown,
        "prompt_tokens": sum(table.column("prompt_tokens").to_pylist()),
        "generated_tokens": sum(table.column("generated_tokens").to_pylist()),
        "startup_seconds": progress.startup_seconds,
        "generate_seconds": round(progress.seconds - progress.startup_seconds, 3),
    }


def _plan(
    facts: ModelFacts,
    notes: Path | str,
    output: Path,
    settings: SummarySettings,
    generation: GenerationSettings,
    language: Language,
    only_ids: Path | None,
) -> tuple[SummaryJob, set[str], int]:
    """The job, the ids to describe, and how many of ``only_ids`` are not among the notes."""
    engine_arguments(facts, generation, images=1, pixels=settings.max_image_pixels)
    tokenizer, prompt = _prompt(facts, settings, generation, language)
    # The model itself is in its fingerprint, wherever it lies.
    shaped_by = {name: value for name, value in shaping(settings).items() if name != "model"}
    made_by = fingerprint(facts.fingerprint, prompt, shaped_by, shaping(generation))
    text = str(notes)
    files = list_note_files(text if "://" in text else Path(text).absolute())
    only = None if only_ids is None else read_ids(only_ids)
    plan = plan_chunks(files, settings.batch_rows, made_by, only)  # for its checks of the table and the ids
    wanted = {note_id for file in files for note_id in note_ids(file).to_pylist()}
    if only is not None:
        wanted &= set(only.to_pylist())
    versions = {file.path: fingerprint(made_by, file.version) for file in files}
    job = SummaryJob(facts, output, files, versions, settings, generation, prompt, tokenizer.end_ids, len(wanted))
    return job, wanted, len(plan.unknown_ids)


def _prompt(
    facts: ModelFacts, settings: SummarySettings, generation: GenerationSettings, language: Language
) -> tuple[ChatTokenizer, list[int]]:
    """The model's tokenizer and the prompt of all images, which fits with any image."""
    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.processors import load_processor
    from notellm2_ray.models.prompt_room import LongPrompt, check_prompt

    processor = load_processor(facts.model)
    tokenizer, parts = ChatTokenizer.of(processor), summary_prompt(language, settings.template)
    room = generation.max_model_len - settings.max_tokens
    remedy = (
        f"Raise generation.max_model_len={generation.max_model_len}, or lower summaries.max_tokens="
        f"{settings.max_tokens} or summaries.max_image_pixels"
    )
    longest = LongPrompt(lambda frames: tokenizer.prompt(parts, frames=frames), room, settings.max_image_pixels, remedy)
    check_prompt(tokenizer, processor, facts.model, longest)
    return tokenizer, tokenizer.prompt(parts)


def _describe(job: SummaryJob, todo: set[str], done: Described, progress: Progress) -> int:
    """Describe and commit images; returns how many were asked for twice."""
    retried = 0
    if not todo:
        return retried
    with closing(run(job, todo)) as batches:  # on an error: ends the actors
        for rows in batches:
            good, bad = sort_rows(rows, job.settings)
            commit(described_parts(job.output), job.facts.fingerprint, good, bad)
            done.summaries.update(row["note_id"] for row in good)
            for row in bad:
                (done.without_image if row["reason"] == NO_IMAGE else done.quarantined).add(row["note_id"])
            retried += sum(row.get(ASKED) == 2 for row in rows)
            progress.add(len(good) + len(bad), tokens=sum(row["generated_tokens"] for row in good))
            _check_bad_share(job, done)
    return retried


def sort_rows(
    rows: Iterable[dict[str, Any]], settings: SummarySettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sort final answers into summaries and quarantined rows."""
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for row in rows:
        text = cleaned(row.get("summary") or "")
        passing = False
        if row.get(ERROR):
            # An image that the reader refused stays unusable. Any other error is the engine's and may not come again.
            problem, passing = row[ERROR], not row.get("error")
        else:
            cut = row["generated_tokens"] >= settings.max_tokens
            problem = problem_of(text, cut, settings)
            text = cut_at_sentence(text) if cut else text
        if problem:
            about = {"note_id": row["note_id"], "version": row["version"]}
            bad.append({**about, "reason": problem, "passing": passing})
        else:
            good.append({**row, "summary": text})
    return good, bad


def _check_bad_share(job: SummaryJob, done: Described) -> None:
    bad, seen = len(done.quarantined), len(done.quarantined) + len(done.summaries)
    images = job.total - len(done.without_image)
    if bad > job.settings.max_bad_share * images:
        store = described_parts(job.output)
        reasons = "; ".join(store.first_reasons("note {key}: {reason}", leave_out=NO_IMAGE))
        raise errors.DataError(
            f"{bad} of the first {seen} images ({images} in all) could not be described, more than "
            f"summaries.max_bad_share={job.settings.max_bad_share:g} allows: {reasons}. "
            f"All are in {store.quarantine}. If the engine failed, run the command again: it asks for those once "
            "more. Otherwise repair the notes, or raise summaries.max_bad_share"
        )
