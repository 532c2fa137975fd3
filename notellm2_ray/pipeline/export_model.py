"""`notellm2 export-model`: copies a trained embedder's directory, and uploads it to the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.core.run import read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.models.embedder.card import CARD_FILE, CardFacts, write_card
from notellm2_ray.pipeline import embedders, recall_outputs
from notellm2_ray.pipeline.stage import require, workspace_of


def facts_of(settings: Settings, figures: dict[str, Any]) -> CardFacts:
    """What the card of a resolved embedder tells.

    Args:
        figures: the counts of its training.
    """
    workspace, name = workspace_of(settings), settings.embedder_name
    return CardFacts(
        name=name,
        location=str(settings.workspace / workspace.embedder_model(name).relative_to(workspace.root)),
        model=settings.model,
        train=settings.train if embedders.is_trained(settings) else None,
        source=settings.source.kind,
        notes=read_manifest(workspace.pairs)["counts"].get("train_notes", 0),
        figures=figures,
    )


def export_model(
    settings: Settings, *, output: Path | None = None, push: str | None = None, private: bool = False
) -> str:
    """Copy the embedder that the settings name out of the workspace, upload it, or both.

    The workspace is only read. The copy's model card names the new place; a directory of an older version gets a card
    and the files for sentence-transformers.

    Args:
        output: directory of the copy; it must not exist, or be empty.
        push: repository on the hub, as in ``me/notes``; it is made if there is none.
        private: whether a new repository is private.

    Returns:
        A sentence for the user that says what was done.

    Raises:
        ConfigError: neither ``output`` nor ``push`` is given, or the hub refuses.
        OutputError: the embedder is not trained with these settings, or ``output`` holds files.
    """
    if output is None and push is None:
        raise ConfigError("say where to: --output DIRECTORY, --push REPOSITORY, or both")
    settings = embedders.resolved(settings)
    require(planned := recall_outputs.embedder(settings), "run `notellm2 train-embedder` first")
    facts = facts_of(settings, read_manifest(planned.directory)["counts"])
    model, done = planned.directory / "model", []
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output} is not empty: choose another directory or empty it yourself")
        _assemble(model, output, facts, str(output), shutil.copy2)
        done.append(f"copied to {output}")
    if push is not None:
        with tempfile.TemporaryDirectory() as place:
            _assemble(model, Path(place), facts, push, os.symlink)
            done.append(f"uploaded to {_upload(Path(place), push, private)}")
    return f"{facts.name}: {' and '.join(done)}"


def _assemble(model: Path, target: Path, facts: CardFacts, location: str, copy: Callable[[str, str], Any]) -> None:
    """Fill ``target`` with the files of a model directory, and a card that names ``location``."""
    from notellm2_ray.models.embedder.storage import describe_to_sentence_transformers

    shutil.copytree(model, target, copy_function=copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CARD_FILE))
    if not (target / "modules.json").exists():
        describe_to_sentence_transformers(target)
    card = model / CARD_FILE
    if card.exists():  # its owner may have changed it
        text = card.read_text(encoding="utf-8").replace(f'"{facts.location}"', f'"{location}"')
        (target / CARD_FILE).write_text(text, encoding="utf-8")
    else:
        write_card(target, facts._replace(location=location))


def _upload(directory: Path, repository: str, private: bool) -> str:
    """Upload a directory; the repository's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=directory, commit_message="Upload the embedder")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(
            f"{repository} cannot be written on the hub: {error}. Log in with `hf auth login`, and name a repository "
            "that is yours"
        ) from error
    return str(url)
