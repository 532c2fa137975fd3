"""Preparing: every raw row ends in exactly one place, with its reason; outputs do not depend on how rows arrive."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from notellm2_ray.core import progress
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA, QUARANTINE_SCHEMA
from notellm2_ray.core.settings.data import PrepareSettings
from notellm2_ray.data.duplicates import EARLIER
from notellm2_ray.data.key_sets import KeySet
from notellm2_ray.data.prepare import prepare
from notellm2_ray.data.sources import SourceTables, open_source
from notellm2_ray.data.sources.tabular import TabularSettings
from notellm2_ray.data.validate import ALIKE_NOTE, check_events, check_notes, hash_ids, without_form
from notellm2_ray.data.writer import RollingWriter


def png(colour: str = "red", size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def checked(row: dict, **settings_) -> dict:
    table = pa.Table.from_pylist([{"_source": "n.csv:2", **row}])
    return pa.concat_tables(check_notes(table, PrepareSettings(**settings_))).to_pylist()[0]


def reason(row: dict, **settings_) -> str | None:
    return checked(row, **settings_)["_reason"]


def test_a_good_note_keeps_its_text_as_it_is():
    text = '  <|im_end|>\n“quoted” \U0001f9a6 {"a": 1}  '
    row = checked({"note_id": 5, "title": text, "topics": ["<s>", "b"], "content": None, "image": png()})
    assert (row["note_id"], row["title"], row["topics"], row["content"]) == ("5", text, ["<s>", "b"], "")
    assert row["image"] == png()
    assert row["_reason"] is None


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_id(value):
    assert reason({"note_id": value, "title": "a"}) == "missing note_id"


def test_a_value_of_the_wrong_type():
    assert reason({"note_id": {"a": 1}, "title": "a"}).startswith("wrong value: note_id is of type struct")
    assert reason({"note_id": "1", "title": ["a"]}).startswith("wrong value: title is of type list")
    assert reason({"note_id": "1", "image": 5}).startswith("wrong value: image is of type int64: give a path")


def test_a_creation_time_that_is_none():
    assert reason({"note_id": "1", "title": "a", "created_at": "soon"}).startswith(
        "unparsable timestamp: created_at 'soon'"
    )


def test_neither_text_nor_image():
    assert reason({"note_id": "1", "title": " ", "topics": [], "content": "\n"}) == "neither text nor image"
    assert reason({"note_id": "1", "topics": ["a"]}) is None
    assert reason({"note_id": "1", "image": png()}) is None


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (png(size=(64, 64))[:-30], "unusable image: "),
        (b"<html>404</html>", "unusable image: not a readable JPEG, PNG, WebP, GIF, BMP, AVIF or TIFF image"),
        (b"", "unusable image: empty, 0 bytes"),
        ("https://host/a.jpg", "unusable image: 'https://host/a.jpg': an http(s) address is not fetched: download"),
        ("s3://bucket/a.jpg", "unusable image: 's3://bucket/a.jpg': s3: addresses are not read"),
        ("file://elsewhere/a.jpg", "unusable image: 'file://elsewhere/a.jpg': a file on another machine"),
        ("/nowhere/a.jpg", "unusable image: '/nowhere/a.jpg': No such file or directory"),
        ("/dev/zero", "unusable image: '/dev/zero': not a regular file"),
        ("/tmp/a\0b.jpg", "unusable image: '/tmp/a\\x00b.jpg': embedded null byte"),
    ],
)
def test_images_that_cannot_be_used(image, message):
    assert reason({"note_id": "1", "title": "a", "image": image}).startswith(message)


def test_an_image_over_the_bounds_is_refused_unread_and_undecoded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(size=(100, 100)))
    row = {"note_id": "1", "title": "a", "image": str(path)}
    assert "more than the 50 allowed (prepare.max_image_bytes)" in reason(row, max_image_bytes=50)
    assert "declares 100 x 100 pixels" in reason(row, max_image_pixels=9_999)
    assert checked(row)["image"] == path.read_bytes()
    (tmp_path / "é b.png").write_bytes(png())
    assert checked({**row, "image": f"file://{tmp_path}/%C3%A9%20b.png"})["image"] == png()


def test_a_bad_image_can_be_dropped_instead():
    row = checked({"note_id": "1", "title": "a", "image": b"junk"}, bad_image="drop")
    assert (row["_reason"], row["image"]) == (None, None)
    assert row["_dropped"].startswith("image dropped, note kept: not a readable")
    alone = reason({"note_id": "1", "image": b"junk"}, bad_image="drop")
    assert alone.startswith("neither text nor image: there is no text, and the image is unusable")


def event(**more) -> dict:
    return {"user_id": "u", "note_id": "1", "timestamp": 1_700_000_000, "action": "view", "_source": "e.csv:2"} | more


def reason_of_event(row: dict) -> dict:
    kept = pa.array(["1", "2", "caf\xe9 "])
    hashes = (np.sort(hash_ids(ids)) for ids in (kept, pa.array(["9"]), without_form(kept)))
    return check_events(pa.Table.from_pylist([row]), *hashes).to_pylist()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": ""}, "missing user_id"),
        ({"note_id": None}, "missing note_id"),
        ({"timestamp": None}, "missing timestamp"),
        ({"timestamp": "noon"}, "unparsable timestamp: timestamp 'noon' is not a time"),
        ({"timestamp": 1_700_000}, "unparsable timestamp: timestamp 1700000 is outside the years"),
        ({"timestamp": 5_000_000_000}, "in the future"),
        ({"action": None}, "missing action"),
        ({"note_id": "3"}, "unknown note"),
        ({"note_id": " 1"}, ALIKE_NOTE),
        ({"note_id": "1\u200b"}, ALIKE_NOTE),
        ({"note_id": "\uff12"}, ALIKE_NOTE),  # a full-width 2
        ({"note_id": "cafe\u0301"}, ALIKE_NOTE),  # the known one has é as one character
        ({"note_id": "1.0"}, ALIKE_NOTE),
        ({"note_id": "9"}, "note is quarantined"),
        ({"user_id": 1.5}, "wrong value: user_id is the number 1.5"),
    ],
)
def test_events_that_cannot_be_used(change, message):
    row = reason_of_event(event(**change))
    assert row["_reason"].startswith(message)
    assert row["_source"] == "e.csv:2"


def test_a_good_event():
    row = reason_of_event(event(note_id=2, user_id=7))
    assert (row["user_id"], row["note_id"], row["_reason"], row["session_id"]) == ("7", "2", None, None)
    assert row["timestamp"] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=8))
def test_key_set_is_a_set(batches):
    keys, seen = KeySet(), set()
    keys._RECENT = 5  # so that both of its halves are used
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in seen)
            seen.add(value)
        assert keys.add(np.array(batch, np.uint64)).tolist() == expected
    assert keys.ascending().tolist() == sorted(seen)
    assert len(keys) == len(seen)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), rows_per_file=st.integers(1, 15), group=st.integers(1, 6), cut=st.integers(1, 12))
def test_files_do_not_depend_on_the_blocks(tmp_path_factory, rows, rows_per_file, group, cut):
    folder = tmp_path_factory.mktemp("rolling")
    schema = pa.schema([pa.field("x", pa.int64())])
    table = pa.table({"x": list(range(rows))})
    for name, size in (("one", rows or 1), ("two", cut)):
        with RollingWriter(folder / name, "part", schema, rows_per_file=rows_per_file, row_group=group) as writer:
            for start in range(0, rows, size):
                writer.write(table.slice(start, size))
    files = sorted(path.name for path in (folder / "one").iterdir())
    assert files == sorted(path.name for path in (folder / "two").iterdir())
    assert all((folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes() for file in files)
    lengths = [pq.read_metadata(folder / "one" / file).num_rows for file in files]
    assert all(length == rows_per_file for length in lengths[:-1])
    assert pq.read_table(folder / "one")["x"].to_pylist() == list(range(rows))


# ---- through Ray -------------------------------------------------------------------------------------------------

NOTES = [
    {"note_id": 1, "title": "<|im_end|> tea", "image": "good.png"},
    {"note_id": "2", "title": "cup", "topics": "a|b"},
    {"note_id": "3", "title": "bad image", "image": "bad.png"},
    {"note_id": "1", "title": "again"},
    {"note_id": None, "title": "no id"},
    {"note_id": "3", "title": "now with a usable image", "image": "good.png"},
    {"note_id": "4", "title": ""},
]
EVENTS = [
    {"user_id": 1, "note_id": 1, "timestamp": 1_700_000_000},
    {"user_id": "2", "note_id": "2", "timestamp": "2023-11-15T22:13:20Z"},
    {"user_id": "2", "note_id": "4", "timestamp": 1_700_000_000},
    {"user_id": "2", "note_id": "77", "timestamp": 1_700_000_000},
    {"user_id": "2", "note_id": "2", "timestamp": "later"},
]


@pytest.fixture
def messy(tmp_path, ray_cluster):
    """A source of seven notes, four of them bad, and five events, three of them bad."""
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(png(size=(64, 64))[:-30])
    for name, rows in (("notes", NOTES), ("events", EVENTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"notes": str(tmp_path / "notes.jsonl"), "events": str(tmp_path / "events.jsonl")}
    return TabularSettings(kind="tabular", **paths)


def test_every_row_ends_in_exactly_one_place(messy, tmp_path):
    output = tmp_path / "prepared"
    counts = prepare(open_source(messy, 0), PrepareSettings(max_bad_share=0.7), output)
    notes, events, bad = (pq.read_table(output / name) for name in ("notes", "events", "quarantine"))
    assert notes.schema.equals(NOTE_SCHEMA)
    assert events.schema.equals(EVENT_SCHEMA)
    assert bad.schema.equals(QUARANTINE_SCHEMA)
    tables = Counter(bad["table"].to_pylist())
    assert notes.num_rows + tables["notes"] == len(NOTES)
    assert events.num_rows + tables["events"] == len(EVENTS)
    # The first row of id 3 was unusable, so its second row is the note; of id 1 it is the last.
    assert notes["note_id"].to_pylist() == ["2", "1", "3"]
    assert notes["title"].to_pylist() == ["cup", "again", "now with a usable image"]
    assert notes["image"].to_pylist() == [None, None, png()]
    assert events["action"].to_pylist() == ["click", "click"]
    by_row = {row["source"].rpartition("/")[2]: row for row in bad.to_pylist()}
    assert by_row["notes.jsonl:1"]["reason"] == EARLIER
    assert by_row["notes.jsonl:1"]["key"] == "1"
    assert by_row["notes.jsonl:3"]["reason"].startswith("unusable image")
    assert by_row["events.jsonl:3"]["reason"] == "note is quarantined"
    assert by_row["events.jsonl:4"]["key"] == "2 / 77"
    assert counts == {
        "notes": 3,
        "events": 2,
        "users": 2,
        "notes_with_image": 1,
        "quarantined_notes": 4,
        "quarantined_events": 3,
        "dropped_images": 0,
        "alike_notes": 0,
        "first_event": "2023-11-14 22:13:20",
        "last_event": "2023-11-15 22:13:20",
        "days_with_events": 2,
        "events_before_note": 0,
        "times_without_zone": 0,
        "reasons": {
            "unusable image": 1,
            "duplicate note_id": 1,
            "missing note_id": 1,
            "neither text nor image": 1,
            "note is quarantined": 1,
            "unknown note": 1,
            "unparsable timestamp": 1,
        },
    }


def test_a_dropped_image_is_in_the_quarantine_and_its_note_among_the_notes(messy, tmp_path):
    output = tmp_path / "prepared"
    with open(tmp_path / "notes.jsonl", "a") as file:
        file.write('{"note_id": "5", "title": "bad image alone", "image": "bad.png"}\n')
    counts = prepare(open_source(messy, 0), PrepareSettings(max_bad_share=0.7, bad_image="drop"), output)
    notes, bad = pq.read_table(output / "notes"), pq.read_table(output / "quarantine")
    titles = dict(zip(notes["note_id"].to_pylist(), notes["title"].to_pylist(), strict=True))
    assert (titles["3"], titles["5"]) == ("now with a usable image", "bad image alone")
    # The first row of id 3 lost its image too, but another row is kept instead of it.
    assert (counts["dropped_images"], counts["quarantined_notes"]) == (1, 4)
    assert sum(reason.startswith("image dropped, note kept") for reason in bad["reason"].to_pylist()) == 1


def test_too_many_bad_rows_stop_the_job_and_are_kept(messy, tmp_path):
    output = tmp_path / "prepared"
    with pytest.raises(DataError) as caught:
        prepare(open_source(messy, 0), PrepareSettings(max_bad_share=0.5), output)
    message = str(caught.value)
    assert "notes: 4 of 7 rows (57.1%) are unusable, more than the 50.0% that prepare.max_bad_share allows" in message
    assert "1 x duplicate note_id, as in" in message
    assert "notes.jsonl:1 (key '1'): the last row is kept" in message
    assert str(output / "quarantine") in message
    assert pq.read_table(output / "quarantine").num_rows == 4


def test_empty_pools(messy, tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(DataError, match="empty pool: the source's events table has no rows"):
        prepare(open_source(messy, 0), PrepareSettings(max_bad_share=1.0), tmp_path / "prepared")
    (tmp_path / "notes.jsonl").write_text('{"note_id": "1", "title": ""}\n')
    with pytest.raises(DataError, match=r"empty pool: none of the 1 rows of the notes table is usable:\n  1 x neither"):
        prepare(open_source(messy, 0), PrepareSettings(max_bad_share=1.0), tmp_path / "prepared")
    (tmp_path / "notes.jsonl").write_text("")
    with pytest.raises(DataError, match="empty pool: the source's notes table has no rows"):
        prepare(open_source(messy, 0), PrepareSettings(max_bad_share=1.0), tmp_path / "prepared")


def test_a_file_that_cannot_be_read_to_its_end_stops_the_job(messy, tmp_path):
    (tmp_path / "notes.csv").write_text('note_id,title\n1,a\n2,"b\n3,c\n')
    source = messy.model_copy(update={"notes": str(tmp_path / "notes.csv")})
    with pytest.raises(DataError, match=r"notes\.csv: the last row, 3, ends inside a quoted value.*Correct or remove"):
        prepare(open_source(source, 0), PrepareSettings(max_bad_share=1.0), tmp_path / "prepared")


def test_the_same_files_from_other_blocks_and_progress_in_the_log(ray_cluster, tmp_path, caplog, monkeypatch):
    import ray.data

    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    notes = pa.table({"note_id": [str(n % 1500) for n in range(1600)], "title": [f"t{n}" for n in range(1600)]})
    events = pa.table({"user_id": ["u"] * 900, "note_id": ["1"] * 900, "timestamp": [1_700_000_000] * 900,
                       "action": ["view"] * 900})  # fmt: skip

    def blocks(table: pa.Table, size: int) -> ray.data.Dataset:
        return ray.data.from_arrow([table.slice(start, size) for start in range(0, table.num_rows, size)])

    digests = []
    for size in (1600, 457):
        output = tmp_path / str(size)
        tables = SourceTables(blocks(notes, size), blocks(events, size), invented_times=True)
        with caplog.at_level(logging.INFO, "notellm2_ray"):
            counts = prepare(tables, PrepareSettings(max_bad_share=0.1, rows_per_file=700), output)
        assert (counts["notes"], counts["quarantined_notes"]) == (1500, 100)
        files = sorted((output / "notes").iterdir())
        assert [pq.read_metadata(file).num_rows for file in files] == [700, 700, 100]
        assert pq.read_table(output / "notes")["title"].to_pylist() == [f"t{n}" for n in range(100, 1600)]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.rglob("*.parquet"))])
    assert digests[0] == digests[1]
    assert "raw notes so far" in caplog.text
    assert "prepare: 1,600 raw notes in all" in caplog.text and "100 quarantined" in caplog.text
    assert not ray.data.DataContext.get_current().execution_options.preserve_order  # other jobs keep theirs


def test_the_last_of_two_notes_is_kept_even_when_its_block_is_the_first_to_be_done(ray_cluster, tmp_path):
    import ray.data

    def slowly(table: pa.Table) -> pa.Table:
        time.sleep(1.0 if table["title"][0].as_py() == "block 0" else 0.0)
        return table

    blocks = [pa.table({"note_id": [str(n) for n in range(600)], "title": [f"block {b}"] * 600}) for b in range(2)]
    notes = ray.data.from_arrow(blocks).map_batches(slowly, batch_format="pyarrow", batch_size=None)
    events = ray.data.from_arrow(pa.Table.from_pylist([event()]))
    prepare(SourceTables(notes, events, invented_times=True), PrepareSettings(max_bad_share=0.5), tmp_path)
    assert set(pq.read_table(tmp_path / "notes")["title"].to_pylist()) == {"block 1"}
