"""The embedding table: what is written is read back, and nothing invalid is written."""

import errno

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.index.table import embedding_schema, read_vectors, table_info, write_table


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def batch(ids: list[str], *matrices: np.ndarray, columns: tuple[str, ...] = ("embedding",)) -> pa.RecordBatch:
    schema = embedding_schema(matrices[0].shape[1], columns, model_fingerprint="someone else's")
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(m.ravel()), m.shape[1]) for m in matrices]
    return pa.RecordBatch.from_arrays([pa.array(ids), *arrays], schema=schema)


def test_round_trip_of_a_stream(tmp_path):
    vectors, pictures = unit(7, 4), unit(7, 4, seed=1)
    ids = [f"笔记{row}" for row in range(7)]
    columns = ("embedding", "embedding_image")
    whole = batch(ids, vectors, pictures, columns=columns)
    stream = (whole.slice(start, 3) for start in (0, 3, 6))
    assert write_table(tmp_path / "t.lance", stream, model_fingerprint="abc") == 7
    assert table_info(tmp_path / "t.lance") == ("abc", 4, columns, 7)
    for column, expected in zip(columns, (vectors, pictures), strict=True):
        read_ids, read = read_vectors(tmp_path / "t.lance", column)
        assert read_ids.tolist() == ids
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected)
    with pytest.raises(DataError, match="embedding_text"):
        read_vectors(tmp_path / "t.lance", "embedding_text")


def test_writing_again_replaces_model_and_rows(tmp_path):
    path = tmp_path / "t.lance"
    write_table(path, [batch(["a", "b"], unit(2, 4))], model_fingerprint="old")
    write_table(path, [batch(["c"], unit(1, 8))], model_fingerprint="new")
    assert table_info(path) == ("new", 8, ("embedding",), 1)
    assert read_vectors(path)[0].tolist() == ["c"]


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN or infinite.*'b1'"), (np.inf, "NaN or infinite.*'b1'"), (3.0, "'b1'.*unit length")],
)
def test_a_broken_vector_is_refused_by_name_and_leaves_the_old_table(tmp_path, value, message):
    path = tmp_path / "t.lance"
    write_table(path, [batch(["a"], unit(1, 4))], model_fingerprint="old")
    bad = unit(2, 4)
    bad[1, 2] = value
    with pytest.raises(DataError, match=message):
        write_table(path, [batch(["x"], unit(1, 4)), batch(["b0", "b1"], bad)], model_fingerprint="new")
    assert table_info(path).model_fingerprint == "old"
    with pytest.raises(DataError, match="b1"):
        write_table(tmp_path / "fresh.lance", [batch(["b0", "b1"], bad)], model_fingerprint="new")
    assert not (tmp_path / "fresh.lance").exists()


def test_a_repeated_note_is_refused_across_and_within_batches(tmp_path):
    across = [batch(["a", "b"], unit(2, 4)), batch(["c", "a"], unit(2, 4))]
    with pytest.raises(DataError, match="'a' appears more than once"):
        write_table(tmp_path / "t.lance", across, model_fingerprint="f")
    with pytest.raises(DataError, match="'d' appears more than once"):
        write_table(tmp_path / "t.lance", [batch(["d", "e", "d"], unit(3, 4))], model_fingerprint="f")


def test_wrong_columns_and_no_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="no embeddings to write"):
        write_table(tmp_path / "t.lance", [], model_fingerprint="f")
    lists = pa.record_batch({"note_id": ["a"], "embedding": [[1.0, 0.0]]})
    with pytest.raises(DataError, match="fixed-size lists of float32"):
        write_table(tmp_path / "t.lance", [lists], model_fingerprint="f")
    with pytest.raises(DataError, match="needed, in this order"):
        write_table(tmp_path / "t.lance", [pa.record_batch({"id": ["a"]})], model_fingerprint="f")


def test_an_absent_table_or_one_of_another_kind_says_what_to_do(tmp_path):
    import lance

    with pytest.raises(DataError, match=r"no\.lance holds no embedding table: run embed-notes"):
        read_vectors(tmp_path / "no.lance")
    lance.write_dataset(pa.table({"x": [1]}), tmp_path / "other.lance")
    with pytest.raises(DataError, match="another kind"):
        read_vectors(tmp_path / "other.lance")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not an embedding table"):
        write_table(tmp_path / "mine", [batch(["a"], unit(1, 4))], model_fingerprint="f")
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_a_full_disk_keeps_its_error_number(tmp_path, monkeypatch):
    import lance

    def full(*args, **kwargs):
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_table(tmp_path / "t.lance", [batch(["a"], unit(1, 4))], model_fingerprint="f")
    assert caught.value.errno == errno.ENOSPC
