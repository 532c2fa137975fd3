"""`export-model`: a copy that both libraries load, an upload, and a workspace that is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from notellm2_ray.cli import main
from notellm2_ray.core.run import files_fingerprint, read_manifest
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.pipeline import recall_stages
from notellm2_ray.pipeline.recall_outputs import pairs
from notellm2_ray.presets import load_settings
from tests.support import tiny_models
from tests.support.recall_workspace import write as write_workspace

NAME = "untrained-seed42"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """Settings of a workspace with an untrained embedder in it."""
    home = write_workspace(tmp_path_factory.mktemp("workspace"))
    small = "{num_layers: 2, num_heads: 2, hidden_size: 16, intermediate_size: 32, num_queries: 4}"
    given = [
        f"workspace={home}",
        f"model.llm={home / 'llm'}",
        f"model.vision={tiny_models.save_clip(home / 'clip')}",
        f"model.qformer={small}",
        "embedders.untrained.trained=false",
        "embedder=untrained",
    ]
    settings = load_settings(None, None, given)
    (home / "prepared" / "manifest.json").write_text('{"fingerprint": "p"}')
    (home / "pairs" / "manifest.json").write_text(
        f'{{"fingerprint": "{pairs(settings).output().fingerprint}", "counts": {{"train_notes": 77}}}}'
    )
    recall_stages.train_embedder(settings)
    return given


@pytest.fixture
def model(overrides) -> Path:
    return Workspace(overrides[0].removeprefix("workspace=")).embedder_model(NAME)


def test_training_ends_with_a_card(model):
    card = (model / "README.md").read_text()
    assert f'from_pretrained("{model}")' in card and "the model before any training" in card
    assert read_manifest(model.parent)["counts"]["model_fingerprint"]


def test_a_copy_is_complete_and_names_its_new_place(overrides, model, tmp_path, capsys):
    before = files_fingerprint(str(model))
    target = tmp_path / "shared"
    main(["export-model", "--output", str(target), *overrides])
    assert f"{NAME}: copied to {target}" in capsys.readouterr().out
    assert {one.name for one in target.iterdir()} == {one.name for one in model.iterdir()}
    assert NoteEncoder.from_pretrained(target).fingerprint == NoteEncoder.from_pretrained(model).fingerprint
    card = (target / "README.md").read_text()
    assert f'SentenceTransformer("{target}"' in card and str(model) not in card
    assert files_fingerprint(str(model)) == before  # a service notices when it changes
    with pytest.raises(SystemExit, match="is not empty"):
        main(["export-model", "--output", str(target), *overrides])


class Hub:
    """Stands in for the hub's client; remembers what it was asked for."""

    made: tuple
    files: dict[str, bytes]

    def create_repo(self, repo_id, *, private, exist_ok):
        from huggingface_hub import RepoUrl

        Hub.made = (repo_id, private, exist_ok)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_an_upload_has_all_files_and_a_card_that_names_the_repository(overrides, model, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    main(["export-model", "--push", "me/notes", "--private", *overrides])
    assert "uploaded to https://huggingface.co/me/notes" in capsys.readouterr().out
    assert Hub.made == ("me/notes", True, True)
    assert Hub.files.keys() == {one.name for one in model.iterdir()}
    assert b'SentenceTransformer("me/notes"' in Hub.files["README.md"]
    assert Hub.files["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_a_directory_of_before_is_completed_and_a_changed_card_kept(overrides, model, tmp_path):
    kept = {name: (model / name).read_text() for name in ("modules.json", "README.md")}
    try:
        (model / "modules.json").unlink()
        (model / "README.md").write_text(kept["README.md"] + "\nAsk Ann about it.\n")
        main(["export-model", "--output", str(tmp_path / "changed"), *overrides])
        (model / "README.md").unlink()
        main(["export-model", "--output", str(tmp_path / "without"), *overrides])
    finally:
        for name, text in kept.items():
            (model / name).write_text(text)
    assert (tmp_path / "changed" / "modules.json").exists()
    assert "Ask Ann" in (tmp_path / "changed" / "README.md").read_text()
    assert "# untrained-seed42" in (tmp_path / "without" / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_with_the_remedy(overrides, monkeypatch):
    with pytest.raises(SystemExit, match="--output DIRECTORY, --push REPOSITORY, or both"):
        main(["export-model", *overrides])
    with pytest.raises(SystemExit, match="run `notellm2 train-embedder` first"):
        main(["export-model", "--push", "me/notes", *overrides, "model.embedding_dim=8"])

    def refuse(self, *_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(SystemExit, match="no route to the hub.*hf auth login"):
        main(["export-model", "--push", "me/notes", *overrides])
