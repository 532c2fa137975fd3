"""Several outputs made together: complete ones are skipped, failed ones stay incomplete."""

import pytest

from notellm2_ray.core.run import Output
from notellm2_ray.pipeline.stage import run_together


def outputs(directory, *sizes):
    return [Output(directory / str(number), "score", {"size": size}) for number, size in enumerate(sizes)]


def test_only_missing_outputs_are_made(tmp_path):
    asked = []

    def work(todo, directories):
        asked.append(list(todo))
        for directory in directories:
            (directory / "scores").write_text("made")
        return [{"rows": number} for number in todo]

    assert run_together(outputs(tmp_path, 1, 2), work) == [{"rows": 0}, {"rows": 1}]
    assert run_together(outputs(tmp_path, 1, 3), work) == [{"rows": 0}, {"rows": 1}]
    assert run_together(outputs(tmp_path, 1, 3), work) == [{"rows": 0}, {"rows": 1}]
    assert asked == [[0, 1], [1]]


def test_a_failed_output_continues_where_it_stopped(tmp_path):
    def fail(todo, directories):
        (directories[0] / "part").write_text("half")
        raise ValueError("engine gone")

    with pytest.raises(ValueError, match="engine gone"):
        run_together(outputs(tmp_path, 1, 2), fail)
    assert not any(output.complete for output in outputs(tmp_path, 1, 2))

    def finish(todo, directories):
        assert (directories[0] / "part").read_text() == "half"
        return [{}, {}]

    run_together(outputs(tmp_path, 1, 2), finish)
    assert all(output.complete for output in outputs(tmp_path, 1, 2))
