"""Which rows are compared, Holm's correction, and what the marks below a table claim."""

import numpy as np
import pytest

from notellm2_ray.evaluate.comparisons import contests, correct, holm, mark_notes, marks, verdict
from notellm2_ray.evaluate.statistics import permutation_tests


def test_holm_on_a_textbook_example():
    # .005 * 4, .01 * 3, .03 * 2, and .04 * 1, which may not be below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_the_best_row_meets_the_second_and_methods_meet_the_best_baseline():
    found = contests([0.2, 0.5, 0.4, 0.6], [True, True, False, False])
    assert found == [(3, 1, "best other"), (2, 1, "best baseline"), (3, 1, "best baseline")]
    assert contests([0.2, 0.9], [False, True])[0] == (1, 0, "best other")  # a baseline can have the mark too
    assert contests([0.2], [False]) == []


def test_seeds_and_units_must_both_agree_where_there_are_seeds():
    both = verdict([0.7, 0.72, 0.71], [0.5, 0.52, 0.51], 1e-9, fixed=False, other_fixed=False)
    assert both["p"] == both["p_seeds"] > 1e-9
    assert verdict([0.7, 0.72, 0.71], [0.5, 0.52, 0.51], 0.4, fixed=False, other_fixed=False)["p"] == 0.4
    single = verdict([0.7], [0.5], 0.001, fixed=False, other_fixed=True)
    assert (single["p_seeds"], single["p"]) == (None, 0.001)
    assert verdict([0.7, 0.8], [0.5, 0.6], None, fixed=False, other_fixed=False)["p"] is None


def compared(p_values, role="best other"):
    return [{"role": role, "column": at, "p": p, "p_seeds": None, "difference": 0.1} for at, p in enumerate(p_values)]


def test_a_family_is_corrected_together_and_marks_say_what_they_claim():
    found = [*compared([0.001, 0.03, 0.9]), *compared([0.03], "best baseline"), *compared([None], "reference")]
    correct(found, lambda test: test["role"])
    assert [test["significant"] for test in found] == [True, False, False, True, False]
    assert marks(found, lambda test: test["column"]) == {0: "†*"}
    worse = [{**test, "difference": -0.1} for test in found]
    assert marks(worse, lambda test: test["column"]) == {}
    (note,) = mark_notes("50.0†*", found, "users")
    assert note.startswith("†: above the best other row of the column. *: above the best baseline")
    assert "over users alone, as there are too few seeds" in note
    assert mark_notes("50.0", found, "users")[0].startswith("No row is above the best other row")
    assert (
        "over users and, where rows have several seeds, over seeds too"
        in mark_notes("†", [{**found[0], "p_seeds": 0.01}], "users")[0]
    )


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_equal_methods_are_marked_in_at_most_one_column_of_twenty(num_seeds):
    """Tables of five equal rows, two of them baselines, with noise of seeds, of units and of examples."""
    rng = np.random.default_rng(11)
    columns, rows, units, tables, marked = 4, 5, 40, 300, 0
    groups = np.repeat(np.arange(units), 2)
    for _ in range(tables):
        level = rng.uniform(0.2, 0.5, size=(columns, 1, 1, len(groups)))
        level = level + 0.05 * rng.normal(size=(columns, rows, num_seeds, 1))
        hits = (rng.random(level.shape) < level).astype(float)
        found = []
        for column, of in enumerate(hits):
            matches = contests(of.mean(axis=(1, 2)).tolist(), [True, True, False, False, False])
            gains = [of[one].mean(axis=0) - of[other].mean(axis=0) for one, other, _ in matches]
            p_units = permutation_tests(np.stack(gains, axis=1), groups, seed=1, num_permutations=999)
            for (one, other, role), p in zip(matches, p_units.tolist(), strict=True):
                tested = verdict(of[one].mean(axis=1), of[other].mean(axis=1), p, fixed=False, other_fixed=False)
                found.append({"role": role, "row": one, "column": column, **tested})
        correct(found, lambda test: test["role"])
        marked += len({column for _, column in marks(found, lambda test: (test["row"], test["column"]))})
    assert marked / (tables * columns) <= 0.05
