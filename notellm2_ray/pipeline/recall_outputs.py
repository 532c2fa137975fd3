"""Where every stage's output lies in the workspace, and what it is made of."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.run import MANIFEST, Output, files_fingerprint, fingerprint, read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.pipeline.recall_comparison import natural_inputs, tested_inputs

log = logging.getLogger("notellm2_ray")


def workspace_of(settings: Settings) -> Path:
    """The workspace, absolute: Ray's workers run in directories of their own."""
    if os.environ.get("RAY_JOB_SUBMISSION_ID") and not settings.workspace.is_absolute():
        log.warning(
            "workspace %s is relative: a submitted job runs in a temporary copy of its working directory, and what it "
            "writes there is lost; give an absolute workspace on shared storage",
            settings.workspace,
        )
    return settings.workspace.absolute()


def fingerprint_of(directory: Path) -> str:
    """Fingerprint of a finished output.

    Raises:
        OutputError: there is none.
    """
    return read_manifest(directory)["fingerprint"]


def tiny_parts(settings: Settings) -> list[str]:
    """Which tiny models these settings need; every variant needs the LLM's tokenizer."""
    from notellm2_ray.models.embedder.variants import VARIANTS

    parts = ["llm"] if _is_tiny(settings, "llm") else []
    names = {settings.model.variant, *settings.evaluate.variants}
    compared = "gru4rec_image" in settings.ranking.baselines and not settings.ranking.image_tower
    if _is_tiny(settings, "vision") and (compared or any(VARIANTS[name].sees_images for name in names)):
        parts.append("clip")
    return parts


def _is_tiny(settings: Settings, which: str) -> bool:
    return (settings.model.llm if which == "llm" else settings.model.vision) == "tiny"


def model_paths(settings: Settings) -> tuple[str, str]:
    """The LLM and the vision tower with 'tiny' resolved to the workspace's own."""
    tiny = workspace_of(settings) / "tiny"
    llm = str(tiny / "llm") if _is_tiny(settings, "llm") else settings.model.llm
    vision = str(tiny / "clip") if _is_tiny(settings, "vision") else settings.model.vision
    return llm, vision


def model_inputs(settings: Settings, which: Sequence[str] = ("llm", "vision")) -> dict[str, str]:
    """Versions of the models that an embedder is built from: of the tiny ones, and of those in directories here."""
    names = {one: getattr(settings.model, one) for one in which}
    found = {one: files_fingerprint(name) for one, name in names.items() if Path(name).is_dir()}
    return found | ({"tiny": fingerprint_of(workspace_of(settings) / "tiny")} if "tiny" in names.values() else {})


def prepared(settings: Settings) -> Output:
    shaped = {"source": to_plain(settings.source), "prepare": to_plain(settings.prepare), "seed": settings.seed}
    directory = workspace_of(settings) / "prepared"
    return Output(directory, "prepare", shaped, _source_versions(settings, directory))


def _source_versions(settings: Settings, directory: Path) -> dict[str, str]:
    """Names, sizes and times of the source's tables, so that new content is noticed; where they are gone, what was made
    of them stands. Of images it is which there are, not what is in them.
    """
    from notellm2_ray.data.sources import table_versions

    versions = table_versions(settings.source)
    if versions is None and (directory / MANIFEST).is_file():
        return dict(read_manifest(directory)["inputs"])
    return {} if versions is None else {name: fingerprint(version) for name, version in versions.items()}


def pairs(settings: Settings) -> Output:
    shaped = {"pairs": shaping(settings.pairs), "split": to_plain(settings.split), "seed": settings.seed}
    prepared = workspace_of(settings) / "prepared"
    return Output(workspace_of(settings) / "pairs", "mine-pairs", shaped, {"prepared": fingerprint_of(prepared)})


def tiny(settings: Settings) -> Output:
    sizes = {name: value for name, value in to_plain(settings.tiny).items() if not name.startswith("mllm_")}
    shaped = {"tiny": sizes, "parts": tiny_parts(settings), "seed": settings.seed}
    shaped["prompt_language"] = settings.model.prompt_language  # its words are in the tokenizer's corpus
    pairs = workspace_of(settings) / "pairs"
    return Output(workspace_of(settings) / "tiny", "build-tiny", shaped, {"pairs": fingerprint_of(pairs)})


def embedder(settings: Settings) -> Output:
    shaped = {"model": to_plain(settings.model), "train": shaping(settings.train)}
    inputs = {"pairs": fingerprint_of(workspace_of(settings) / "pairs"), **model_inputs(settings)}
    directory = workspace_of(settings) / "embedders" / settings.embedder_name
    return Output(directory, "train-embedder", shaped, inputs)


def inputs_of(settings: Settings, pool: str) -> tuple[str, ...]:
    """What an embedder is shown: of the test pool what it is tested with, of the whole pool what it is meant for, and
    by ``embed.by_modality`` each part of it alone."""
    if pool == "test":
        return tested_inputs(settings, settings.model.variant)
    natural = natural_inputs(settings.model.variant)
    return (natural, "image", "text") if settings.embed.by_modality and natural == "multimodal" else (natural,)


def embeddings(settings: Settings, pool: str) -> Output:
    workspace = workspace_of(settings)
    embed = shaping(settings.embed)
    shaped = {"embed": embed, "inputs": list(inputs_of(settings, pool))}
    sources = {"embedder": fingerprint_of(workspace / "embedders" / settings.embedder_name)}
    if pool == "test" or settings.embed.notes is None:
        sources["prepared"] = fingerprint_of(workspace / "prepared")
    if pool == "test":
        embed.pop("notes")
        sources["pairs"] = fingerprint_of(workspace / "pairs")
    return Output(embedding_table(settings, pool).with_suffix(""), "embed-notes", shaped, sources)


def embedding_table(settings: Settings, pool: str) -> Path:
    """The embedding table of the whole pool or of the test pool; its blocks lie beside it."""
    suffix = "" if pool == "all" else f"-{pool}"
    return workspace_of(settings) / "embeddings" / f"{settings.embedder_name}{suffix}.lance"


def ann_index(settings: Settings) -> Output:
    embeddings = workspace_of(settings) / "embeddings" / settings.embedder_name
    directory = workspace_of(settings) / "index" / settings.embedder_name
    shaped = {"index": to_plain(settings.index), "seed": settings.seed}
    return Output(directory, "build-index", shaped, {"embeddings": fingerprint_of(embeddings)})


def evaluation(settings: Settings, compared: Sequence[Settings]) -> Output:
    inputs = {each.embedder_name: fingerprint_of(embedding_table(each, "test").with_suffix("")) for each in compared}
    inputs["pairs"] = fingerprint_of(workspace_of(settings) / "pairs")
    index = workspace_of(settings) / "index" / settings.embedder_name  # its figures are shown where there is one
    if (index / MANIFEST).is_file():
        inputs["index"] = fingerprint_of(index)
    shaped = {"evaluate": to_plain(settings.evaluate), "llm": settings.model.llm, "seed": settings.seed}
    return Output(workspace_of(settings) / "report" / "retrieval", "eval-retrieval", shaped, inputs)


# Settings that decide where and how fast a stage runs, not what it makes: changing them redoes nothing.
_RESOURCES = {
    "partitions",
    "cpus_per_worker",
    "gpus_per_worker",
    "prefetch_batches",
    "max_failures",
    "logger",
    "actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "concurrent_calls",
    "concurrent_batches",
    "batch_rows",
    "preprocess_threads",
    "max_bad_share",  # of what was made and what not, it decides neither
}


def shaping(section: BaseModel) -> dict[str, Any]:
    """A section's settings that shape what is made."""
    return {key: value for key, value in to_plain(section).items() if key not in _RESOURCES}
