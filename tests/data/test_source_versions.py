"""New content under an old name is noticed; tables that are gone leave what was made of them."""

import json

import pytest

from notellm2_ray import outputs
from notellm2_ray.cli import load_settings


@pytest.fixture
def settings(tmp_path):
    for name, line in (("notes", "note_id,title\na,red"), ("events", "user_id,note_id,timestamp\nu,a,1")):
        (tmp_path / f"{name}.csv").write_text(line)
    given = [f"workspace={tmp_path / 'work'}", "source.kind=tabular"]
    return load_settings(None, None, [*given, *(f"source.{one}={tmp_path / one}.csv" for one in ("notes", "events"))])


def test_new_content_makes_another_output(settings, tmp_path):
    before = outputs.prepared(settings).fingerprint
    assert outputs.prepared(settings).fingerprint == before
    (tmp_path / "events.csv").write_text("user_id,note_id,timestamp\nu,a,1\nu,a,2")
    assert outputs.prepared(settings).fingerprint != before


def test_tables_that_are_gone_change_nothing(settings, tmp_path):
    output = outputs.prepared(settings)
    with output.write():
        pass
    assert set(json.loads((output.directory / "manifest.json").read_text())["inputs"]) == {
        "source.notes",
        "source.events",
    }
    (tmp_path / "notes.csv").unlink()
    assert outputs.prepared(settings).complete
