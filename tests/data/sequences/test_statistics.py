"""Counts, means and quantiles from histograms."""

import numpy as np

from notellm2_ray.data.sequences.statistics import describe, tally


def test_statistics_by_hand():
    summary = describe([tally(np.array([1, 1, 2])), tally(np.array([2, 10])), tally(np.zeros(0, np.int64))])
    assert summary["count"] == 5 and summary["mean"] == 3.2
    assert [summary[name] for name in ("min", "median", "p75", "p90", "max")] == [1, 2, 2, 10, 10]
    assert describe([]) == {"count": 0}
