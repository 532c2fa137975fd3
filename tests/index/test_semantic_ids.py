"""Semantic ids: nearest centroids level by level, whatever notes are called, and figures that can be recomputed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from notellm2_ray.cli import main
from notellm2_ray.core.errors import ConfigError, DataError, OutputError
from notellm2_ray.core.run import Output
from notellm2_ray.core.settings import IdSettings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.index import semantic_ids
from notellm2_ray.index.id_table import ID_SCHEMA, write_ids
from notellm2_ray.index.semantic_ids import SemanticIds, content_keys, tell_apart
from notellm2_ray.index.table import take_vectors, write_table
from notellm2_ray.presets import load_settings
from tests.index.test_table import batch, unit

SMALL = IdSettings(levels=3, codebook_size=8, train_notes=150)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """200 unit vectors around 20 centres, of which two are equal."""
    found = unit(20, 8).repeat(10, axis=0) + 0.2 * unit(200, 8, seed=1)
    found[7] = found[150]
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def table(path: Path, vectors: np.ndarray, names: list[str]) -> Path:
    whole = batch(names, vectors)
    write_table(path, [whole.slice(begin, 64) for begin in range(0, len(names), 64)], model_fingerprint="abc")
    return path


def made(directory: Path, vectors: np.ndarray, names: list[str], settings: IdSettings = SMALL):
    """Figures, and codes by name."""
    directory.mkdir()
    figures = write_ids(table(directory / "t.lance", vectors, names), directory, settings, 42)
    ids = pq.read_table(directory / "codes.parquet")
    assert ids.schema == ID_SCHEMA
    return figures, dict(zip(ids["note_id"].to_pylist(), ids["codes"].to_pylist(), strict=True))


def nearest_by_brute_force(vector: np.ndarray, codebooks: np.ndarray) -> tuple[list[int], list[float]]:
    rest, codes, errors = vector.astype(float), [], []
    for codebook in codebooks:
        codes.append(int(np.argmin([((rest - centroid) ** 2).sum() for centroid in codebook])))
        rest = rest - codebook[codes[-1]]
        errors.append((rest**2).sum())
    return codes, errors


def test_every_code_is_the_nearest_centroid_of_what_is_left(vectors, monkeypatch):
    ids = SemanticIds.fit(vectors, levels=3, codebook_size=8)
    expected = [nearest_by_brute_force(vector, ids.codebooks) for vector in vectors]
    for rows_at_once in (200, 33):
        monkeypatch.setattr(semantic_ids, "_VALUES_AT_ONCE", 8 * rows_at_once)
        codes, errors = ids.encode_with_errors(vectors)
        assert codes.tolist() == [codes for codes, _ in expected]
        np.testing.assert_allclose(errors, [errors for _, errors in expected], atol=1e-5)
    for levels in (1, 2, 3):
        distances = ((vectors - ids.decode(codes[:, :levels])) ** 2).sum(axis=1)
        np.testing.assert_allclose(distances, errors[:, levels - 1], atol=1e-5)
    by_level = errors.mean(axis=0)
    assert by_level[0] < 1 and (np.diff(by_level) < 0).all()


def test_similar_notes_share_their_first_code(vectors):
    coarse = SemanticIds.fit(vectors, levels=1, codebook_size=20).encode(vectors)[:, 0]
    shared = [(group == np.bincount(group).argmax()).mean() for group in coarse.reshape(20, 10)]
    assert np.mean(shared) > 0.8


def test_names_and_order_of_notes_do_not_matter(vectors, tmp_path):
    names = [f"n{row}" for row in range(200)]
    figures, codes = made(tmp_path / "first", vectors, names)
    assert made(tmp_path / "again", vectors, names) == (figures, codes)
    order = np.random.default_rng(3).permutation(200)
    others, renamed = made(tmp_path / "renamed", vectors[order], [f"x{row}" for row in order])
    assert others["collision_rate"] == figures["collision_rate"]
    equal = {7, 150}  # two notes of one vector can only be told apart by the table's order
    for row in range(200):
        kept = -1 if row in equal else None
        assert renamed[f"x{row}"][:kept] == codes[f"n{row}"][:kept], row


def test_the_figures_are_what_they_are_called(vectors, tmp_path):
    figures, codes = made(tmp_path / "ids", vectors, [f"n{row}" for row in range(200)])
    all_codes = [tuple(found) for found in codes.values()]
    assert len(set(all_codes)) == 200 and {len(found) for found in all_codes} == {4}
    groups: dict[tuple[int, ...], list[int]] = {}
    for *found, digit in all_codes:
        groups.setdefault(tuple(found), []).append(digit)
    assert all(sorted(digits) == list(range(len(digits))) for digits in groups.values())
    assert figures["collision_rate"] == pytest.approx(1 - len(groups) / 200) and figures["collision_rate"] > 0
    assert figures["largest_group"] == max(map(len, groups.values()))
    assert figures["codes_used"] == [len({found[level] for found in all_codes}) for level in range(3)]
    ids = SemanticIds.load(tmp_path / "ids")
    assert (ids.levels, ids.codebook_size, ids.model_fingerprint) == (3, 8, "abc")
    np.testing.assert_array_equal(ids.encode(vectors), [found[:3] for found in all_codes])
    errors = ids.encode_with_errors(vectors)[1].mean(axis=0)
    np.testing.assert_allclose(figures["reconstruction_error"], errors, atol=1e-6)


def test_ids_without_the_last_digit(vectors, tmp_path):
    plain = SMALL.model_copy(update={"tell_apart": False})
    _, codes = made(tmp_path / "ids", vectors, [f"n{row}" for row in range(200)], plain)
    assert {len(found) for found in codes.values()} == {3}


def test_the_last_digit_follows_the_keys():
    codes = np.array([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1]], np.int32)
    assert tell_apart(codes, np.array([30, 5, 10, 20, 7])).tolist() == [2, 0, 0, 1, 0]


def test_keys_tell_vectors_apart_and_follow_their_content(vectors):
    keys = content_keys(vectors)
    assert keys[7] == keys[150] and len(set(keys.tolist())) == 199
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(content_keys(vectors[order]), keys[order])
    assert 60 < (keys < 2**63).sum() < 140  # the smallest are a random sample


def test_rows_are_taken_in_the_order_asked_for(vectors, tmp_path):
    path = table(tmp_path / "t.lance", vectors, [f"n{row}" for row in range(200)])
    rows = np.array([199, 3, 64, 0])
    np.testing.assert_array_equal(take_vectors(path, rows), vectors[rows])


def test_few_notes_damaged_files_and_other_vectors_are_refused(vectors, tmp_path):
    with pytest.raises(DataError, match=r"200 notes are too few for codebooks of 256: lower ids\.codebook_size"):
        SemanticIds.fit(vectors, levels=1, codebook_size=256)
    with pytest.raises(OutputError, match="run export-ids first"):
        SemanticIds.load(tmp_path)
    with pytest.raises(DataError, match="for length 8"):
        SemanticIds.fit(vectors, levels=1, codebook_size=2).encode(unit(3, 4))
    with pytest.raises(ConfigError, match=r"ids\.train_notes \(100\) is below"):
        load_settings(None, None, ["ids.train_notes=100"])


def test_as_many_codes_as_different_notes_leave_no_error(vectors):
    few = vectors[:12].repeat(2, axis=0)
    ids = SemanticIds.fit(few, levels=2, codebook_size=12)
    assert ids.encode_with_errors(few)[1][:, 0].max() < 1e-6


def test_the_command_writes_ids_and_a_manifest_once(vectors, tmp_path, capsys):
    workspace = Workspace(tmp_path)
    name = "notellm2-seed42"
    with Output(workspace.embeddings(name, "all"), "embed-notes", {}).write():
        pass
    table(workspace.embedding_table(name, "all"), vectors, [f"n{row}" for row in range(200)])
    arguments = [f"workspace={tmp_path}", "ids.codebook_size=8", "ids.levels=2"]
    main(["export-ids", *arguments])
    home = workspace.semantic_ids(name)
    counts = json.loads((home / "manifest.json").read_text())["counts"]
    assert (counts["notes"], counts["levels"], len(counts["reconstruction_error"])) == (200, 2, 2)
    assert pq.read_table(home / "codes.parquet").num_rows == 200
    main(["export-ids", "--dry-run", *arguments])
    assert "already there" in capsys.readouterr().out
