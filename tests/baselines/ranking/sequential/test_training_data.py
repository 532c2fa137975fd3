"""What the sequential baselines may learn from: nothing that is tested."""

import pytest

from notellm2_ray.baselines.ranking.sequential.training_data import known_part, training_data
from notellm2_ray.core.workspace import Workspace
from tests.support.ranking_workspace import NUM_USERS, sequence_of, write_sequences


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    home = tmp_path_factory.mktemp("workspace")
    write_sequences(home / "sequences")
    return Workspace(home)


def test_no_held_out_target_is_seen(workspace):
    rows, validation = training_data(workspace, "users", published=False)
    assert rows == [sequence_of(user)[: 6 if user < 40 else 5] for user in range(NUM_USERS)]
    assert validation == [(sequence_of(user)[:5], sequence_of(user)[5]) for user in range(40, 50)]


def test_split_by_time_nothing_later_than_the_first_validation_target_is_seen(workspace):
    rows, _ = training_data(workspace, "time", published=False)
    # The users of days 0 to 39 train; user 40 gives the first validation target, at hour 5 of day 40.
    assert rows == [sequence_of(user)[: 6 if user < 40 else 5] for user in range(41)]


@pytest.mark.parametrize(
    ("held_out", "trained", "known"),
    [(set(), True, "abcd"), (set(), False, "abc"), ({"c"}, True, "ab"), ({"d", "b"}, False, "a"), ({"x"}, False, "")],
)
def test_what_may_be_known_of_a_sequence(held_out, trained, known):
    assert known_part(list("abcd"), held_out, trained=trained) == list(known)
