"""The tables that several tests read."""

from pathlib import Path

import pytest

from tests.support.sequences import make, make_log


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("written"), make_log(), train_targets="every_block", num_train_negatives=2)
