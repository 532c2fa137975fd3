"""Output directories are complete or absent, and directories of other programs are left alone."""

import errno
import json

import pytest

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import Output, read_manifest, stream_seed


def output(path, **settings) -> Output:
    return Output(path / "out", "stage", settings, {"input": "abc"})


def test_a_finished_output_is_complete_until_settings_change(tmp_path):
    first = output(tmp_path, a=1)
    assert not first.complete
    with first.write() as counts:
        counts["rows"] = 3
    assert first.complete
    assert read_manifest(first.directory)["counts"] == {"rows": 3}
    assert not output(tmp_path, a=2).complete


def test_a_stopped_run_is_continued_only_with_the_same_settings(tmp_path):
    stopped = output(tmp_path, a=1)
    with pytest.raises(RuntimeError), stopped.write():
        (stopped.directory / "block").write_text("done")
        raise RuntimeError
    assert not stopped.complete
    assert stopped.resumable
    with output(tmp_path, a=1).write():
        assert (stopped.directory / "block").exists()
    with pytest.raises(RuntimeError), output(tmp_path, a=1).write():
        raise RuntimeError
    with output(tmp_path, a=2).write():
        assert not (stopped.directory / "block").exists()


def test_a_directory_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="not written by this program"), output(tmp_path).write():
        pass
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write")])
def test_a_full_or_read_only_disk_is_explained(tmp_path, code, words):
    with pytest.raises(OutputError, match=words), output(tmp_path).write():
        raise OSError(code, "provoked")


def test_a_missing_or_damaged_manifest_is_explained(tmp_path):
    with pytest.raises(OutputError, match="run its stage first"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(OutputError, match="damaged"):
        read_manifest(tmp_path)


def test_random_streams_are_independent_and_stable():
    assert stream_seed(42, "world", 1) == stream_seed(42, "world", 1)
    assert len({stream_seed(seed, name) for seed in range(20) for name in ("a", "b", "1")}) == 60
    assert 0 <= stream_seed(0, "x") < 2**63
