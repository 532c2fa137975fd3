"""A source defined outside the package works with the real command line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from notellm2_ray import cli
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings.sources import SOURCES, Source, SourceSettings, register_source
from notellm2_ray.data.rows import raw_events, raw_notes
from notellm2_ray.data.sources import SourceTables, table_versions
from notellm2_ray.data.sources.files import TableFile, dataset, file_version
from notellm2_ray.presets import load_settings
from tests.support import ROOT


class ToySettings(SourceSettings):
    """A text file whose lines are notes (`note ID TITLE`) and events (`event USER ID SECOND`)."""

    kind: Literal["toy"]
    path: Path = Field(description="the text file")


def read_toy(settings: ToySettings, seed: int) -> SourceTables:
    file = [TableFile(str(settings.path), "text")]
    notes = partial(read_lines, settings, "note", ("note_id", "title"))
    events = partial(read_lines, settings, "event", ("user_id", "note_id", "timestamp"))
    return SourceTables(notes=dataset(file, notes), events=dataset(file, events))


def read_lines(settings: ToySettings, kind: str, columns: tuple[str, ...], file: TableFile) -> Iterator[pa.Table]:
    lines = [line.split(maxsplit=len(columns)) for line in settings.path.read_text().splitlines()]
    rows = [dict(zip(columns, values, strict=False)) for first, *values in lines if first == kind]
    numbers = [f"{file.path}:{row}" for row, (first, *_) in enumerate(lines, 1) if first == kind]
    table = pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in columns]))
    table = table.append_column("_source", pa.array(numbers))
    if kind == "note":
        yield raw_notes(table)
    else:
        yield raw_events(table.append_column("action", pa.array(["click"] * table.num_rows)))


TOY = Source(
    settings=ToySettings,
    read=read_toy,
    versions=lambda settings: {"source.path": [file_version(settings.path)]},
    has_creation_times=False,
)


@pytest.fixture
def toy():
    register_source(TOY)
    yield
    SOURCES.remove("toy")


@pytest.fixture
def given(tmp_path) -> list[str]:
    """Overrides that choose a toy source of two good notes and events, and a bad one of each."""
    path = tmp_path / "toy.txt"
    path.write_text(
        "note a A red hat\nnote b Blue shoes\nnote a Again\n"
        "event u a 1700000000\nevent v b 1700086400\nevent v c 1700086400\nevent v a x\n"
    )
    return [
        f"workspace={tmp_path / 'work'}", "source.kind=toy", f"source.path={path}", "split.by=notes",
        "prepare.max_bad_share=0.5",
    ]  # fmt: skip


def test_a_registered_source_is_prepared_and_its_bad_rows_are_quarantined(toy, given, tmp_path, ray_cluster):
    cli.main(["prepare", *given])
    prepared = tmp_path / "work" / "prepared"
    notes, events = (pq.read_table(prepared / name).to_pylist() for name in ("notes", "events"))
    assert [(note["note_id"], note["title"]) for note in notes] == [("b", "Blue shoes"), ("a", "Again")]
    assert [(event["user_id"], event["note_id"], event["action"]) for event in events] == [
        ("u", "a", "click"),
        ("v", "b", "click"),
    ]
    bad = pq.read_table(prepared / "quarantine").to_pylist()
    assert {(row["source"], row["reason"].partition(":")[0]) for row in bad} == {
        (f"{tmp_path / 'toy.txt'}:1", "duplicate note_id"),
        (f"{tmp_path / 'toy.txt'}:6", "unknown note"),
        (f"{tmp_path / 'toy.txt'}:7", "unparsable timestamp"),
    }
    assert list(json.loads((prepared / "manifest.json").read_text())["inputs"]) == ["source.path"]


def test_its_changes_are_noticed(toy, given, tmp_path):
    source = load_settings(None, None, given).source
    before = table_versions(source)
    (tmp_path / "toy.txt").write_text("note a A red hat\n")
    assert before != table_versions(source)
    (tmp_path / "toy.txt").unlink()
    assert table_versions(source) is None


def test_its_settings_are_checked_and_explained(toy, given):
    assert "  source.path = required\n      the text file\n" in cli.knobs(("source",))
    with pytest.raises(ConfigError, match=r"'source\.paht'; did you mean 'source\.path'"):
        load_settings(None, None, [*given, "source.paht=x"])
    with pytest.raises(ConfigError, match=r"'source\.path' is of another source\.kind: set source\.kind=toy"):
        load_settings(None, None, ["source.path=x"])
    with pytest.raises(ConfigError, match=r"setting 'source\.path': Field required"):
        load_settings(None, None, ["source.kind=toy"])
    with pytest.raises(ConfigError, match="creation times, which toy lacks"):
        load_settings(None, None, [*given, "split.by=time"])


def test_the_example_in_the_documentation_works(tmp_path, monkeypatch, ray_cluster):
    page = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    (tmp_path / "shop.py").write_text(
        page.partition("## A source of your own")[2].split("```python\n")[1].split("```")[0]
    )
    monkeypatch.syspath_prepend(tmp_path)
    shop = importlib.import_module("shop").SOURCE
    (tmp_path / "items.csv").write_text("note_id,title\na,A red hat\n,Nothing\n")
    (tmp_path / "sales.csv").write_text(
        "user_id,note_id,timestamp,action\nu,a,1700000000,click\nu,b,1700000000,click\n"
    )
    register_source(shop)
    try:
        given = [f"workspace={tmp_path / 'work'}", "source.kind=shop", f"source.folder={tmp_path}", "split.by=notes"]
        cli.main(["prepare", *given, "prepare.max_bad_share=0.5"])
    finally:
        SOURCES.remove("shop")
    prepared = tmp_path / "work" / "prepared"
    assert pq.read_table(prepared / "notes")["note_id"].to_pylist() == ["a"]
    assert pq.read_table(prepared / "events")["user_id"].to_pylist() == ["u"]
    assert pq.read_table(prepared / "quarantine").num_rows == 2


def test_an_unknown_kind_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"'source\.kind': unknown source 'tabulr' \(known: .*did you mean 'tabular'"):
        load_settings(None, None, ["source.kind=tabulr"])


def test_two_sources_cannot_have_the_same_kind(toy):
    register_source(TOY)  # registering the same source again is allowed
    with pytest.raises(ConfigError, match="there is a source 'toy' already"):
        register_source(Source(settings=ToySettings, read=read_toy, versions=lambda settings: {}))


def test_an_installed_package_adds_a_source_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "notes_of_mine.py").write_text(
        "from typing import Literal\n"
        "from notellm2_ray.core.settings.sources import Source, SourceSettings\n\n"
        "class Mine(SourceSettings):\n"
        "    '''Mine.'''\n\n"
        "    kind: Literal['mine']\n\n"
        "SOURCE = Source(settings=Mine, read=lambda settings, seed: None, versions=lambda settings: {})\n"
    )
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (tmp_path / "mine-1.0.dist-info" / "entry_points.txt").write_text(
        "[notellm2_ray.sources]\nmine = notes_of_mine:SOURCE\nbroken = notes_of_nobody:SOURCE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_settings(None, None, ["source.kind=mine"]).source).__name__ == "Mine"
    assert "source: Mine." in cli.knobs(("source",))
    with pytest.raises(ConfigError, match="'broken' is declared by an installed package as notes_of_nobody:SOURCE"):
        load_settings(None, None, ["source.kind=broken"])


def test_built_in_sources_have_the_kind_of_their_row():
    assert {name: SOURCES.get(name).kind for name in SOURCES.rows} == {name: name for name in SOURCES.rows}
