"""The outputs of the stages of recall, and what each depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from notellm2_ray.core.config import shaping, to_plain
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import MANIFEST, fingerprint, read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.models.embedder.kinds import adapted_module
from notellm2_ray.pipeline.embedders import (
    is_baseline,
    is_trained,
    model_reads,
    model_versions,
    parts_of,
    shown_inputs,
    tiny_parts,
)
from notellm2_ray.pipeline.seeds import drawn_with, label_of, recall_workspace
from notellm2_ray.pipeline.stage import Planned, workspace_of


def prepared(settings: Settings) -> Planned:
    shaped = {"source": to_plain(settings.source), "prepare": shaping(settings.prepare), "seed": settings.seed}
    return Planned("prepare", workspace_of(settings).prepared, shaped, versions=_source_versions(settings))


def _source_versions(settings: Settings) -> dict[str, str]:
    """Versions of the source's tables by name, size and time, to notice changes.

    Images are compared by name, not by content. If the tables are gone, notes prepared from them stay valid.
    """
    from notellm2_ray.data.sources import table_versions

    directory = workspace_of(settings).prepared
    versions = table_versions(settings.source)
    if versions is None and (directory / MANIFEST).is_file():
        return dict(read_manifest(directory)["inputs"])
    return {} if versions is None else {name: fingerprint(version) for name, version in versions.items()}


def pairs(settings: Settings) -> Planned:
    shaped = {"pairs": shaping(settings.pairs), "split": to_plain(settings.split), "seed": settings.seed}
    workspace = workspace_of(settings)
    reads, versions = {"prepared": workspace.prepared}, _own_pairs_version(settings)
    return Planned("mine-pairs", workspace.pairs, shaped, reads, versions=versions)


def _own_pairs_version(settings: Settings) -> dict[str, str]:
    """Version of ``pairs.table``; if it is gone, pairs that were read from it stay valid."""
    from notellm2_ray.data.pairs.own import SETTING
    from notellm2_ray.data.sources.files import table_version

    directory = workspace_of(settings).pairs
    if settings.pairs.table is None:
        return {}
    try:
        return {SETTING: fingerprint(table_version(settings.pairs.table, "auto", SETTING))}
    except DataError:
        there = read_manifest(directory)["inputs"] if (directory / MANIFEST).is_file() else {}
        return {name: version for name, version in there.items() if name == SETTING}


def tiny(settings: Settings) -> Planned:
    """The tiny models of ``train.seed``."""
    workspace = recall_workspace(settings)
    sizes = {name: value for name, value in shaping(settings.tiny).items() if not name.startswith("mllm_")}
    shaped = {"tiny": sizes, "parts": tiny_parts(settings), "seed": drawn_with(settings, workspace, "tiny")}
    shaped["prompt_language"] = settings.model.prompt_language  # the prompt's words are in the tokenizer's corpus
    return Planned("build-tiny", workspace.tiny, shaped, {"pairs": workspace.pairs}, name=label_of(workspace, "tiny"))


def embedder(settings: Settings) -> Planned:
    workspace, parts = workspace_of(settings), parts_of(settings)
    shaped: dict[str, Any] = {"model": shaping(settings.model), "train": shaping(settings.train)}
    reads = {"pairs": workspace.pairs, **model_reads(settings, parts)}
    if settings.train.lora is not None and is_trained(settings):
        adapted_module(settings.model)  # fails at once if it must
    if not is_trained(settings):
        shaped["trained"] = False
    elif (source := name_of_source(settings)) is not None:
        reads["negatives"] = workspace.negatives(source)
    return Planned(
        "train-embedder",
        workspace.embedder(settings.embedder_name),
        shaped,
        reads,
        versions=model_versions(settings, parts),
        name=settings.embedder_name,
    )


def embeddings(settings: Settings, pool: str) -> Planned:
    workspace = workspace_of(settings)
    embed = shaping(settings.embed)
    shaped = {"embed": embed, "inputs": list(shown_inputs(settings, pool))}
    reads = {"embedder": workspace.embedder(settings.embedder_name)}
    if pool != "all" or settings.embed.notes is None:
        reads["prepared"] = workspace.prepared
    if pool != "all":
        embed.pop("notes")
        reads["pairs"] = workspace.pairs
    directory = workspace.embeddings(settings.embedder_name, pool)
    return Planned("embed-notes", directory, shaped, reads, name=directory.name)


def name_of_source(settings: Settings) -> str | None:
    """Directory name of the embedder whose negatives the one of resolved settings is trained with."""
    source = settings.train.negatives_of
    return None if source is None else f"{source}-seed{settings.train.seed}"


def negatives(settings: Settings) -> Planned:
    workspace, name = workspace_of(settings), settings.embedder_name
    shaped = {"negatives": shaping(settings.negatives), "index": shaping(settings.index), "seed": settings.seed}
    shaped["clicks"] = list(settings.pairs.click_actions)
    reads = {"prepared": workspace.prepared, "pairs": workspace.pairs}
    reads["embeddings"] = workspace.embeddings(name, "train")
    return Planned("mine-negatives", workspace.negatives(name), shaped, reads, name=name)


def ann_index(settings: Settings) -> Planned:
    workspace, name = workspace_of(settings), settings.embedder_name
    shaped = {"index": shaping(settings.index), "seed": settings.seed}
    return Planned(
        "build-index", workspace.index(name), shaped, {"embeddings": workspace.embeddings(name, "all")}, name=name
    )


def semantic_ids(settings: Settings) -> Planned:
    workspace, name = workspace_of(settings), settings.embedder_name
    shaped = {"ids": shaping(settings.ids), "seed": settings.seed}
    reads = {"embeddings": workspace.embeddings(name, "all")}
    return Planned("export-ids", workspace.semantic_ids(name), shaped, reads, name=name)


def evaluation(settings: Settings, compared: Sequence[Settings]) -> Planned:
    workspace = workspace_of(settings)
    reads = {each.embedder_name: workspace.embeddings(each.embedder_name, "test") for each in compared}
    shaped = {"evaluate": to_plain(settings.evaluate), "llm": settings.model.llm, "seed": settings.seed}
    shaped["baselines"] = sorted({each.embedder_row for each in compared if is_baseline(each)})
    shaped["clicks"] = list(settings.pairs.click_actions)
    return Planned(
        "eval-retrieval",
        workspace.recall_report,
        shaped,
        {**reads, "pairs": workspace.pairs},
        reads_if_there={"index": workspace.index(settings.embedder_name)},  # the report shows its figures
    )
