"""The rows of the ranking tables: their scores, their needs, and the names that settings may use."""

import numpy as np
import pyarrow as pa
import pytest

from notellm2_ray.baselines.ranking.baseline import RankingBaseline
from notellm2_ray.baselines.ranking.data import RankingData, read_protocol
from notellm2_ray.baselines.ranking.table import RANKING_BASELINES, needs, untuned_rows
from notellm2_ray.baselines.recall.table import RECALL_BASELINES
from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.presets import load_settings
from tests.support.ranking_workspace import NOTES, save, settings_for, write_sequences


def settings_of(*baselines):
    return load_settings(None, None, [f"ranking.baselines=[{','.join(baselines)}]"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp("workspace")
    write_sequences(home / "sequences")
    notes = [{name: None for name in NOTE_SCHEMA.names} | {"note_id": note} for note in NOTES]
    undated = pa.schema([field.with_nullable(True) for field in NOTE_SCHEMA])
    save(home / "prepared" / "notes" / "part.parquet", notes, undated)
    workspace = Workspace(home)
    return RankingData(settings_for(home), workspace, [read_protocol(workspace, "uniform")], llm="", image_tower="")


def scores(data, name):
    return RANKING_BASELINES.get(name).scores(data, data.protocols[0])


def test_popularity_and_random_need_no_training(data):
    (clicks,) = scores(data, "popularity").values()
    assert set(clicks) == {0, 1, 2}
    drawn = scores(data, "random")
    assert list(drawn) == [1, 2]
    assert not np.array_equal(drawn[1], drawn[2])


def test_the_newest_of_notes_without_dates_is_an_error(data):
    with pytest.raises(DataError, match="newest needs notes with created_at"):
        scores(data, "newest")


def test_missing_tables_say_which_stage_to_run(data):
    with pytest.raises(DataError, match="run the sequences stage"):
        read_protocol(data.workspace, "published")


def test_the_named_rows_say_what_they_need():
    assert needs(settings_of("random", "popularity", "untuned")) == set()
    assert needs(settings_of("gru4rec_image", "gru4rec_summary")) == {"image_tower", "image_summaries", "llm"}
    assert untuned_rows(settings_of("random", "untuned_text", "untuned")) == {
        "untuned_text": "tallrec",
        "untuned": "mllm_msr",
    }


def test_a_mistyped_row_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'ranking\.baselines': unknown ranking baseline 'gru4rce' .*mean 'gru4rec'"):
        settings_of("gru4rce")
    with pytest.raises(ConfigError, match=r"'evaluate\.baselines': unknown recall baseline 'bm52' .*mean 'bm25'"):
        load_settings(None, None, ["evaluate.baselines=[bm52]"])


def test_a_row_without_scores_is_refused():
    with pytest.raises(ConfigError, match="needs either a function for its scores, or untuned"):
        RankingBaseline()


def test_every_row_can_be_loaded():
    for table in (RANKING_BASELINES, RECALL_BASELINES):
        for name in table.names():
            assert table.get(name)
