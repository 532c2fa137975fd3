"""Readers: column maps, odd strings, bad lines, and the two real data sets."""

from __future__ import annotations

import csv
import json
from datetime import UTC, date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_ray.core.errors import DataError
from notellm2_ray.data.columns import to_text, to_timestamps, to_topics
from notellm2_ray.data.sources import open_source
from notellm2_ray.data.sources.files import list_files
from notellm2_ray.data.sources.microlens import MicroLensSettings, _read_pairs, _read_sequences, hashtags
from notellm2_ray.data.sources.movielens import MovieLensSettings, _events, _movies, poster_files
from notellm2_ray.data.sources.tabular import (
    ColumnMap,
    TabularSettings,
    _check_columns,
    _read_events,
    _read_notes,
    tabular_tables,
)


def write(path, rows, format_):
    names = list(dict.fromkeys(name for row in rows for name in row))
    if format_ == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif format_ == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def read_notes(path, **more):
    given_settings = TabularSettings(kind="tabular", notes=str(path), events="unused", **more)
    files = list_files(given_settings.notes, given_settings.format, "source.notes")
    return pa.concat_tables([part for file in files for part in _read_notes(given_settings, file)]).to_pylist()


def read_events(path, **more):
    given_settings = TabularSettings(kind="tabular", notes="unused", events=str(path), **more)
    files = list_files(given_settings.events, given_settings.format, "source.events")
    return pa.concat_tables([part for file in files for part in _read_events(given_settings, file)]).to_pylist()


ODD = st.text(max_size=20) | st.sampled_from(
    ["<|im_end|>", '<IMG>"', "a\r\nb", "\n", "a,b;\t'", "\ufeff", "null", "NaN", "\\N"]
)
ID = st.text(min_size=1, max_size=8)


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(ID, ODD, ODD), min_size=1, max_size=6))
def test_odd_strings_come_back_as_they_are(tmp_path_factory, format_, rows):
    path = tmp_path_factory.mktemp("odd") / f"notes.{format_}"
    write(path, [{"note_id": key, "title": title, "content": body} for key, title, body in rows], format_)
    read = read_notes(path)
    assert [(row["note_id"], row["title"], row["content"]) for row in read] == rows
    assert not any(row["_error"] for row in read)


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_all_formats_read_the_same_through_a_column_map(tmp_path, format_):
    rows = [
        {"nid": 7, "name": "Tea", "tags": "a | b|", "when": 1_700_000_000, "pic": "x.png"},
        {"nid": 8, "name": "Cup"},
    ]
    if format_ == "csv":
        rows[1] |= {"tags": "", "when": "", "pic": ""}
    write(tmp_path / f"notes.{format_}", rows, format_)
    columns = ColumnMap(note_id="nid", title="name", topics="tags", created_at="when", image="pic")
    first, second = read_notes(tmp_path / f"notes.{format_}", columns=columns)
    assert (first["note_id"], first["title"], first["topics"]) == ("7", "Tea", ["a", "b"])
    assert first["created_at"] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert first["image"] == {"bytes": None, "path": str(tmp_path / "x.png")}  # relative to the table's folder
    assert not second["topics"]
    assert second["created_at"] is None
    assert not second["image"]


def test_images_from_a_root_by_uri_and_as_bytes(tmp_path):
    rows = [
        {"note_id": "1", "image": "a/b.jpg"},
        {"note_id": "2", "image": "file:///c.jpg"},
        {"note_id": "3", "image": "/d.jpg"},
    ]
    write(tmp_path / "notes.csv", rows, "csv")
    images = [row["image"]["path"] for row in read_notes(tmp_path / "notes.csv", image_root=tmp_path / "root")]
    assert images == [str(tmp_path / "root/a/b.jpg"), "file:///c.jpg", "/d.jpg"]
    write(tmp_path / "notes.parquet", [{"note_id": "1", "image": b"\xff\xd8"}], "parquet")
    assert read_notes(tmp_path / "notes.parquet")[0]["image"] == {"bytes": b"\xff\xd8", "path": None}


def test_a_relative_image_root_starts_where_the_command_was_given(tmp_path, ray_cluster, monkeypatch):
    write(tmp_path / "notes.csv", [{"note_id": "1", "image": "a.jpg"}], "csv")
    write(tmp_path / "events.csv", [{"user_id": "u", "note_id": "1", "timestamp": 1}], "csv")
    monkeypatch.chdir(tmp_path)  # Ray's workers stay where they are
    notes, *_ = tabular_tables(
        TabularSettings(kind="tabular", notes="notes.csv", events="events.csv", image_root="pictures")
    )
    assert notes.take_all()[0]["image"]["path"] == str(tmp_path / "pictures/a.jpg")


def test_topics_as_string_or_list_in_one_file(tmp_path):
    rows = [{"note_id": 1, "title": "a", "topics": ["x", "", 5]}, {"note_id": "2", "title": "b", "topics": "y|z"}]
    write(tmp_path / "notes.jsonl", rows, "jsonl")
    first, second = read_notes(tmp_path / "notes.jsonl")
    assert (first["note_id"], first["topics"]) == ("1", ["x", "5"])
    assert (second["note_id"], second["topics"]) == ("2", ["y", "z"])
    assert to_topics(pa.array([["a"], None])).values.to_pylist() == [["a"], None]


def test_missing_required_column_names_file_columns_and_setting(tmp_path):
    write(tmp_path / "n.csv", [{"id": "1", "title": "a"}], "csv")
    write(tmp_path / "e.csv", [{"user_id": "u", "note_id": "1", "timestamp": 1}], "csv")
    wrong = TabularSettings(kind="tabular", notes=str(tmp_path / "n.csv"), events=str(tmp_path / "e.csv"))
    with pytest.raises(
        DataError, match=r"n\.csv: missing column 'note_id'; its columns are id, title\..*source\.columns\.note_id"
    ):
        tabular_tables(wrong)
    columns = ColumnMap(note_id="id", content="body")  # a column that is named in the settings must be there
    with pytest.raises(DataError, match=r"missing column 'body'.*source\.columns\.content"):
        tabular_tables(wrong.model_copy(update={"columns": columns}))


def test_notes_without_any_text_or_image_column(tmp_path):
    write(tmp_path / "n.jsonl", [{"note_id": "1", "heading": "a"}], "jsonl")
    file = list_files(str(tmp_path / "n.jsonl"), "auto", "source.notes")[0]
    with pytest.raises(
        DataError, match=r"neither text nor image; its columns are note_id, heading.*source\.columns\.title"
    ):
        _check_columns(file, ColumnMap(), ("note_id", "title"), required=("note_id",), any_of=("title", "image"))


def test_missing_files_and_files_of_another_format(tmp_path):
    with pytest.raises(DataError, match=r"no such table file; set source\.notes"):
        list_files(str(tmp_path / "*.csv"), "auto", "source.notes")
    (tmp_path / "n.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"n\.xlsx.*set source\.format"):
        list_files(str(tmp_path / "n.xlsx"), "auto", "source.notes")
    (tmp_path / "n.parquet").write_text("no parquet")
    events = str(tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n\.parquet: cannot be read as parquet"):
        tabular_tables(TabularSettings(kind="tabular", notes=str(tmp_path / "n.parquet"), events=events))
    (tmp_path / "n.jsonl").write_text('[{"note_id": "1"}]')
    with pytest.raises(DataError, match="JSON array"):
        tabular_tables(TabularSettings(kind="tabular", notes=str(tmp_path / "n.jsonl"), events=events))


def test_a_directory_is_read_in_order_of_names_and_a_gzip_as_what_it_holds(tmp_path):
    import gzip

    write(tmp_path / "b.csv", [{"note_id": "2", "title": "two"}], "csv")
    write(tmp_path / "a.jsonl", [{"note_id": "1", "title": "one"}], "jsonl")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"note_id,title\n3,three\n"))
    (tmp_path / "_SUCCESS").write_text("")
    assert [row["note_id"] for row in read_notes(tmp_path)] == ["1", "2", "3"]


def test_a_bad_csv_line_costs_one_row_and_names_it(tmp_path):
    (tmp_path / "n.csv").write_bytes(b'note_id,title\n1,"a\nb"\n2\n3,\xff\xfe\n4,d,e\n5,f\n')
    rows = {row["_source"].rpartition(":")[2]: row for row in read_notes(tmp_path / "n.csv")}
    assert len(rows) == 5
    assert rows["3"]["_error"] == "unreadable row: 1 values for 2 columns"
    assert rows["5"]["_error"] == "unreadable row: 3 values for 2 columns"
    assert rows["4"]["_error"].startswith("wrong value: title is not valid Unicode")
    assert (rows["2"]["title"], rows["6"]["title"]) == ("a\nb", "f")


def test_a_quote_that_is_never_closed_is_not_taken_for_the_end(tmp_path):
    (tmp_path / "n.csv").write_text('note_id,title\n1,a\n2,"b\n3,c\n4,d\n')
    with pytest.raises(DataError, match=r"n\.csv: the last row, 3, ends inside a quoted value"):
        read_notes(tmp_path / "n.csv")


def test_bad_json_lines_cost_one_row_each(tmp_path):
    lines = [
        '{"note_id": 1, "title": "a"}',
        "{oops",
        "",
        "[1]",
        '{"note_id": true}',
        '{"note_id": "x", "title": "\\ud800"}',
    ]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    rows = {row["_source"].rpartition(":")[2]: row for row in read_notes(tmp_path / "n.jsonl")}
    assert set(rows) == {"1", "2", "4", "5", "6"}
    assert rows["1"]["_error"] is None
    assert rows["2"]["_error"].startswith("unreadable row: not JSON")
    assert rows["4"]["_error"] == "unreadable row: a JSON list, not an object"
    assert rows["5"]["_error"].startswith("wrong value: note_id is of type bool")
    assert "title is not valid Unicode" in rows["6"]["_error"]


def test_a_json_time_that_cannot_be_read_costs_its_own_row(tmp_path):
    times = [1_700_000_000.25, 1_700_000_000, 1.7e9, "2023-11-14", None, float("nan"), "20231114"]
    bad = ["unknown", True, [1]]
    rows = [{"user_id": "u", "note_id": "1", "timestamp": time} for time in times + bad]
    write(tmp_path / "e.jsonl", rows, "jsonl")
    read = read_events(tmp_path / "e.jsonl")
    assert [bool(row["_error"]) for row in read] == [False] * len(times) + [True] * len(bad)
    assert read[0]["timestamp"] == datetime(2023, 11, 14, 22, 13, 20, 250_000, tzinfo=UTC)
    assert [row["timestamp"] for row in read[4:6]] == [None, None]
    assert read[6]["timestamp"] == read[3]["timestamp"] == datetime(2023, 11, 14, tzinfo=UTC)
    write(tmp_path / "n.jsonl", [{"note_id": "1", "title": "a", "created_at": time} for time in times + bad], "jsonl")
    notes = read_notes(tmp_path / "n.jsonl")
    assert [row["created_at"] for row in notes] == [row["timestamp"] for row in read]
    assert [bool(row["_error"]) for row in notes] == [bool(row["_error"]) for row in read]


def test_actions_by_default_only_where_the_table_has_none(tmp_path):
    write(tmp_path / "a.csv", [{"user_id": "u", "note_id": "1", "timestamp": 1}], "csv")
    assert read_events(tmp_path / "a.csv", default_action="view")[0]["action"] == "view"
    write(tmp_path / "b.csv", [{"user_id": "u", "note_id": "1", "timestamp": 1, "action": ""}], "csv")
    assert not read_events(tmp_path / "b.csv")[0]["action"]


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([1_700_000_000, None], "s"),
        ([1_700_000_000_000, None], "ms"),
        ([1_700_000_000.0, None], "s"),
        (["1700000000", ""], "s"),
        (["2023-11-14T22:13:20Z", None], "s"),
        (["2023-11-14 22:13:20", " "], "ms"),
        (["2023-11-15T00:13:20+02:00", "1700000000"], "s"),
        ([datetime(2023, 11, 14, 22, 13, 20), None], "s"),
        ([1_700_000_000, 1_700_000_000_000], "auto"),
        ([1_700_000_000_000_000, 1_700_000_000_000_000_000], "auto"),
        (["1700000000000000000", "1700000000.0"], "auto"),
        ([20231114221320, None], "auto"),
        ([20231114221320.0, float("nan")], "date"),
    ],
)
def test_times_in_all_their_shapes(values, unit):
    times, problems, _ = to_timestamps(pa.array(values), unit)
    moment = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert times[0].as_py() == moment
    assert times[1].as_py() in (None, moment)
    assert not problems


def test_impossible_times_are_named():
    problems = to_timestamps(pa.array(["yesterday", "2023-02-30", "1700000000000", "2023-11-14"]), "s").problems
    assert set(problems) == {0, 1, 2}
    assert problems[0].startswith("'yesterday' is not a time")
    assert "source.time_unit" in problems[2]
    assert to_timestamps(pa.array([2**62]), "us").problems
    assert set(to_timestamps(pa.array([20240631, 20241301, 12345, 0, -1, 1_717_200_000])).problems) == {0, 1, 2, 3, 4}
    assert "source.time_unit" in to_timestamps(pa.array([1_717_200_000]), "ms").problems[0]
    assert to_timestamps(pa.array([10**18], pa.int64()).cast(pa.timestamp("s"))).problems


def test_times_without_a_zone_are_in_the_zone_of_the_settings():
    shanghai = datetime(2024, 5, 31, 16, tzinfo=UTC)
    local = [20240601, "20240601", "2024-06-01", "2024-06-01T00:00:00", date(2024, 6, 1), datetime(2024, 6, 1)]
    for value in local:
        read = to_timestamps(pa.array([value]), zone="Asia/Shanghai")
        assert (read.values.to_pylist(), read.local.tolist()) == ([shanghai], [False])
        read = to_timestamps(pa.array([value]))
        assert (read.values.to_pylist(), read.local.tolist()) == ([datetime(2024, 6, 1, tzinfo=UTC)], [True])
    for value in (1_717_171_200, "2024-06-01T00:00:00+08:00", shanghai):
        read = to_timestamps(pa.array([value]), zone="Asia/Tokyo")
        assert (read.values.to_pylist(), read.local.tolist()) == ([shanghai], [False])
    mixed = to_timestamps(pa.array(["2024-06-01T00:00:00", "2024-06-01T00:00:00Z", None]))
    assert mixed.local.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="no time zone 'Shanghai'"):
        TabularSettings(kind="tabular", notes="n", events="e", time_zone="Shanghai")


def test_ids_that_pandas_turned_to_floats():
    assert to_text(pa.array([7.0, None, float("nan")])).values.to_pylist() == ["7", None, None]
    assert to_text(pa.array([7.5])).problems == {0: "is the number 7.5, not text"}
    assert to_text(pa.array([{"a": 1}])).problems[0].startswith("is of type struct")


def test_microlens_sequences_keep_their_order(tmp_path):
    from notellm2_ray.data.sources.files import TableFile

    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"1\t10 11 12\nnonsense\n2\t11\n3\t\xff\n")
    rows = pa.concat_tables(_read_sequences(TableFile(str(path), "tsv"))).to_pylist()
    good = [row for row in rows if not row["_error"]]
    assert [(row["user_id"], row["note_id"]) for row in good] == [("1", "10"), ("1", "11"), ("1", "12"), ("2", "11")]
    assert [row["timestamp"].second for row in good] == [0, 1, 2, 0]
    bad = {row["_source"].rpartition(":")[2]: row["_error"] for row in rows if row["_error"]}
    assert set(bad) == {"2", "4"}
    assert "not of the form user<TAB>item" in bad["2"]


def test_microlens_three_columns_in_milliseconds(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("user,item,timestamp\n1,10,1700000000000\n1,11,1700000001000\n")
    file = list_files(str(path), "csv", "source.pairs")[0]
    rows = pa.concat_tables(_read_pairs(file)).to_pylist()
    assert rows[1]["timestamp"] == datetime(2023, 11, 14, 22, 13, 21, tzinfo=UTC)
    assert {row["action"] for row in rows} == {"click"}


def test_hashtags_may_be_phrases():
    assert hashtags("look # funny God reversal #a#b # funny God reversal ,") == ["funny God reversal", "a", "b"]
    assert hashtags("none at all") == []


def test_movielens_ratings_are_views_and_good_ones_clicks():
    raw = pa.table(
        {
            "userId": ["1", "1", "1", "2"],
            "movieId": ["5", "6", "7", "5"],
            "rating": ["3.5", "3.0", "5.0", "x"],
            "timestamp": ["1000000100", "1000000200", "1000000300", "1000000400"],
            "_source": ["r:2", "r:3", "r:4", "r:5"],
            "_error": pa.nulls(4, pa.string()),
        }
    )
    rows = _events(raw, 3.5, pa.array(["5", "6"])).to_pylist()
    assert [(row["note_id"], row["action"]) for row in rows] == [
        ("5", "view"),
        ("5", "click"),
        ("6", "view"),
        ("5", "view"),
    ]
    assert (rows[1]["timestamp"] - rows[0]["timestamp"]).total_seconds() == 0.001
    assert rows[3]["_error"] == "wrong value: rating 'x' is not a number"


def test_movielens_movies():
    raw = pa.table(
        {
            "movieId": ["1", "2"],
            "title": ["Heat (1995)", "None (2000)"],
            "genres": ["Action|Crime", "(no genres listed)"],
            "_source": ["m:2", "m:3"],
            "_error": pa.nulls(2, pa.string()),
        }
    )
    rows = _movies(raw, {"1": "/p/1.jpg"}, {"1": "heist, noir"}, posters_only=False).to_pylist()
    assert (rows[0]["topics"], rows[0]["content"]) == (["Action", "Crime"], "heist, noir")
    assert rows[0]["image"] == {"bytes": None, "path": "/p/1.jpg"}
    assert (rows[1]["topics"], rows[1]["content"], rows[1]["image"]) == ([], "", None)
    assert _movies(raw, {"1": "/p/1.jpg"}, {}, posters_only=True)["note_id"].to_pylist() == ["1"]


def test_movielens_without_posters(tmp_path):
    folder = tmp_path / "movielens"
    folder.mkdir()
    settings = MovieLensSettings(kind="movielens", directory=folder)
    with pytest.raises(DataError, match=r"set source\.directory to .* posters/, or source\.posters_only=false$"):
        poster_files(settings)
    assert poster_files(settings.model_copy(update={"posters_only": False})) == {}


def test_missing_source_files_name_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"movies\.csv: no such file; set source\.directory"):
        open_source(MovieLensSettings(kind="movielens", directory=tmp_path), 0)
    with pytest.raises(DataError, match=r"no such file; set source\.titles"):
        open_source(MicroLensSettings(kind="microlens", pairs=tmp_path / "p.tsv", titles=tmp_path / "t.csv"), 0)


def test_the_real_movielens_with_posters(ray_cluster, shared_data):
    source = MovieLensSettings(kind="movielens", directory=shared_data / "movielens_posters")
    notes, events, _ = open_source(source, 0)
    ids = {row["note_id"] for row in notes.iter_rows()}
    seen = events.to_pandas()
    # Four of the posters are of movies that only have tags: they are notes without ratings.
    assert (len(ids), seen["note_id"].nunique()) == (2947, 2943)
    assert set(seen["note_id"]) <= ids
    assert seen["action"].value_counts().to_dict() == {"view": 58_498, "click": 34_910}


def test_the_real_microlens_sample(ray_cluster, shared_data):
    folder = shared_data / "microlens_sample"
    source = MicroLensSettings(
        kind="microlens", pairs=folder / "MicroLens-50k_pairs.tsv", titles=folder / "MicroLens-50k_titles.csv"
    )
    notes, events, _ = open_source(source, 0)
    assert notes.count() == 12_303
    seen = events.to_pandas()
    assert (len(seen), seen["user_id"].nunique()) == (35_767, 5_000)
    assert seen["_error"].isna().all()
