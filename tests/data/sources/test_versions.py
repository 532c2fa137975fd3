"""New content under an old name is noticed; where tables are gone, what was prepared from them stays valid."""

import json
from itertools import pairwise

import pytest

from notellm2_ray.data.sources import table_versions
from notellm2_ray.data.sources.microlens import MicroLensSettings
from notellm2_ray.data.sources.movielens import MovieLensSettings
from notellm2_ray.data.sources.tabular import TabularSettings
from notellm2_ray.pipeline import recall_outputs as outputs
from notellm2_ray.presets import load_settings


@pytest.fixture
def settings(tmp_path):
    for name, line in (("notes", "note_id,title\na,red"), ("events", "user_id,note_id,timestamp\nu,a,1")):
        (tmp_path / f"{name}.csv").write_text(line)
    given = [f"workspace={tmp_path / 'work'}", "source.kind=tabular"]
    return load_settings(None, None, [*given, *(f"source.{one}={tmp_path / one}.csv" for one in ("notes", "events"))])


def test_new_content_makes_another_output(settings, tmp_path):
    before = outputs.prepared(settings).output().fingerprint
    assert outputs.prepared(settings).output().fingerprint == before
    (tmp_path / "events.csv").write_text("user_id,note_id,timestamp\nu,a,1\nu,a,2")
    assert outputs.prepared(settings).output().fingerprint != before


def test_tables_that_are_gone_change_nothing(settings, tmp_path):
    output = outputs.prepared(settings).output()
    with output.write():
        pass
    assert set(json.loads((output.directory / "manifest.json").read_text())["inputs"]) == {
        "source.notes",
        "source.events",
    }
    (tmp_path / "notes.csv").unlink()
    assert outputs.prepared(settings).complete


def test_tags_and_posters_are_part_of_movielens(tmp_path):
    source = MovieLensSettings(kind="movielens", directory=tmp_path)
    assert table_versions(source) is None
    (tmp_path / "posters").mkdir()
    for name in ("ratings.csv", "movies.csv", "tags.csv", "posters/1.jpg"):
        (tmp_path / name).write_text(name)
    seen = [table_versions(source)]
    (tmp_path / "tags.csv").write_text("more tags")
    seen.append(table_versions(source))
    (tmp_path / "posters" / "2.jpg").write_text("")
    seen.append(table_versions(source))
    (tmp_path / "tags.csv").unlink()
    seen.append(table_versions(source))
    assert None not in seen
    assert all(one != other for one, other in pairwise(seen))


def test_covers_are_part_of_microlens(tmp_path):
    source = MicroLensSettings(kind="microlens", pairs=tmp_path / "p.tsv", titles=tmp_path / "t.csv", covers=tmp_path)
    for name in ("p.tsv", "t.csv"):
        (tmp_path / name).write_text(name)
    before = table_versions(source)
    (tmp_path / "1.jpg").write_text("")
    assert before is not None
    assert before != table_versions(source)


def test_tables_at_a_uri_are_watched(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.csv").write_text("note_id,title\n1,a")
    (tmp_path / "events.csv").write_text("user_id,note_id,timestamp\nu,1,1")
    source = TabularSettings(
        kind="tabular", notes=(tmp_path / "notes").as_uri(), events=(tmp_path / "events.csv").as_uri()
    )
    seen = [table_versions(source)]
    (tmp_path / "events.csv").write_text("user_id,note_id,timestamp\nu,1,12")
    seen.append(table_versions(source))
    (tmp_path / "notes" / "b.csv").write_text("note_id,title\n2,b")
    seen.append(table_versions(source))
    assert None not in seen
    assert [path for path, _, _ in seen[2]["source.notes"]] == [f"{source.notes}/{name}.csv" for name in "ab"]
    assert seen[0] != seen[1] != seen[2]
    (tmp_path / "events.csv").unlink()
    assert table_versions(source) is None
