"""A column of pictures in the forms that tables have."""

from __future__ import annotations

import pyarrow as pa
import pytest

from notellm2_ray.data.pictures import PICTURE, json_pictures, to_pictures

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def path(value):
    return {"bytes": None, "path": value}


def data(value, name=None):
    return {"bytes": value, "path": name}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (pa.array(["a.jpg", " ", None]), [path("a.jpg"), None, None]),
        (pa.array([b"x", None]), [data(b"x"), None]),
        # Hugging Face's image struct: the bytes count, and the path is only their name
        (pa.array([data(b"x", "a.jpg"), path("b.jpg"), None, path(None)], STRUCT),
         [data(b"x", "a.jpg"), path("b.jpg"), None, None]),
        (pa.array([[data(b"x")], [path(""), data(b"y")], []], pa.large_list(STRUCT)), [data(b"x"), data(b"y"), None]),
        # of a list, the first picture that is not blank is the cover
        (pa.array([["a", "b"], ["", None, "c"], [], None]), [path("a"), path("c"), None, None]),
        (pa.array([[b"x", b"y"]]), [data(b"x")]),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), [path("a")]),
        # through CSV
        (pa.array(['["a.jpg", "b.jpg"]', "['a.jpg' 'b.jpg']", '{"path": "c.jpg"}', "[1].jpg", "[x]"]),
         [path("a.jpg"), path("a.jpg"), path("c.jpg"), path("[1].jpg"), path("[x]")]),
        (pa.array([str({"bytes": b"\xff\xd8", "path": None})]), [data(b"\xff\xd8")]),
        (pa.array([float("nan"), None]), [None, None]),  # a column of missing values, as pandas writes it
        (pa.array([None]), [None]),
    ],
)  # fmt: skip
def test_forms_of_pictures(cells, expected):
    pictures, problems = to_pictures(cells)
    assert (pictures.type, pictures.to_pylist(), problems) == (PICTURE, expected, {})
    assert to_pictures(pictures).values.equals(pictures)


def test_json_values_of_several_forms():
    found = json_pictures(["a.jpg", ["b.jpg"], {"bytes": "aGk=", "path": "c"}, None, 5])
    assert found.values.to_pylist() == [path("a.jpg"), path("b.jpg"), data(b"hi"), None, None]
    assert found.problems[4].startswith("is of type int: give a path")


def test_a_number_is_no_picture():
    assert to_pictures(pa.array([None, 5])).problems[1].startswith("is of type int64: give a path")
    assert to_pictures(pa.array([[5], []])).problems.keys() == {0}
