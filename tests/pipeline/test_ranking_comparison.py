"""From the directories of the stages to the report; and what the sequential baselines may know."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.baselines.ranking.rows import Baselines, known_part, read_protocol, training_data
from notellm2_ray.core import schema
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.pipeline.ranking_comparison import compare_ranking
from notellm2_ray.pipeline.ranking_outputs import Scored

NUM_USERS, NUM_NOTES, LENGTH, NEGATIVES = 60, 24, 6, 4
START = datetime(2024, 1, 1, tzinfo=UTC)
NOTES = [f"n{at}" for at in range(NUM_NOTES)]


def save(path: Path, rows, kind) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, kind), path)


def sequence_of(user):
    """User u takes the notes of one of two kinds, around a circle."""
    return [NOTES[(2 * (user // 2 + step) + user % 2) % NUM_NOTES] for step in range(LENGTH)]


def write_sequences(home: Path) -> None:
    """40 users train, 10 validate, 10 test."""
    rng = np.random.default_rng(0)
    rows, examples = [], {"train": [], "valid": [], "test": []}
    blocks, candidates = [], {"valid": [], "test": [], "train": []}
    for user in range(NUM_USERS):
        notes, name = sequence_of(user), f"u{user}"
        times = [START + timedelta(days=user, hours=step) for step in range(LENGTH)]
        rows.append({"user_id": name, "note_ids": notes, "timestamps": times, "session_ids": [None] * LENGTH})
        side = "train" if user < 40 else "valid" if user < 50 else "test"
        example = {"example_id": f"{name}/5", "user_id": name, "block": 1, "history_ids": notes[:-1]}
        examples[side].append({**example, "target_id": notes[-1], "timestamp": times[-1]})
        blocks += [{"user_id": name, "block": b, "note_ids": notes[3 * b : 3 * b + 3][: 5 - 3 * b]} for b in (0, 1)]
        others = rng.permutation([note for note in NOTES if note not in notes])[:NEGATIVES]
        shown = [(notes[-1], 1), *((str(note), 0) for note in others)]
        candidates[side] += [{"example_id": f"{name}/5", "note_id": note, "label": label} for note, label in shown]
    save(home / "sequences.parquet", rows, schema.SEQUENCE_SCHEMA)
    save(home / "blocks.parquet", blocks, schema.BLOCK_SCHEMA)
    for side, table in examples.items():
        save(home / f"{side}.parquet", table, schema.EXAMPLE_SCHEMA)
    for protocol in ("uniform", "popular"):
        save(home / "candidates" / f"{protocol}.parquet", candidates["test"], schema.CANDIDATE_SCHEMA)
    clicks = [{"note_id": note, "clicks": at % 3} for at, note in enumerate(NOTES)]
    save(home / "popularity.parquet", clicks, pa.schema([("note_id", pa.string()), ("clicks", pa.int64())]))
    (home / "statistics.json").write_text('{"users": 60}')


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    from tests.support.tiny_models import picture, save_clip, save_llm

    home = tmp_path_factory.mktemp("workspace")
    write_sequences(home / "sequences")
    # a note's kind is its picture and the words of its summary; one note has no picture
    notes = [
        {"note_id": note, "title": f"title {note}", "topics": [], "content": "", "created_at": None,
         "image": picture(at % 2) if at else None}
        for at, note in enumerate(NOTES)
    ]  # fmt: skip
    save(home / "prepared" / "notes" / "part.parquet", notes, schema.NOTE_SCHEMA)
    words = ("red round cat", "a small green house")
    texts = [
        {"note_id": note, "summary": words[at % 2], "prompt_tokens": 1, "generated_tokens": 1}
        for at, note in enumerate(NOTES)
    ]
    save(home / "image_summaries" / "summaries.parquet", texts, schema.SUMMARY_SCHEMA)
    tastes = [
        {
            "user_id": f"u{user}",
            "block": b,
            "preference": f"The user likes kind {user % 2}",
            "prompt_tokens": 1,
            "generated_tokens": 1,
        }
        for user in range(50, 60)
        for b in (0, 1)
    ]
    save(home / "preferences" / "recurrent" / "preferences.parquet", tastes, schema.PREFERENCE_SCHEMA)
    (home / "rankers" / "mllm_msr-seed1").mkdir(parents=True)
    history = [json.dumps({"step": step, "loss": 1 / (step + 1), "valid_auc": 0.6}) for step in range(5)]
    (home / "rankers" / "mllm_msr-seed1" / "history.jsonl").write_text("\n".join(history))
    save_clip(home / "clip")
    save_llm(home / "llm")
    return home


def settings_for(workspace, **changed):
    ranking = {"seeds": [1, 2], "cutoffs": [1, 3], "sample_users": 3, **changed.pop("ranking", {})}
    model = {"llm": str(workspace / "llm"), "vision": str(workspace / "clip")}
    return Settings.model_validate({"workspace": str(workspace), "ranking": ranking, "model": model, **changed})


def write_scores(path: Path, protocol: str, workspace: Path, strength: float, seed: int) -> Path:
    rows = pq.read_table(workspace / "sequences" / "candidates" / f"{protocol}.parquet").to_pylist()
    noise = np.random.default_rng(seed).random(len(rows))
    save(
        path,
        [{**row, "score": n + strength * row["label"]} for row, n in zip(rows, noise, strict=True)],
        schema.SCORE_SCHEMA,
    )
    return path


@pytest.mark.slow
def test_everything_is_compared_and_reported(workspace, tmp_path):
    names = ["random", "popularity", "gru4rec", "sasrec", "gru4rec_image", "gru4rec_summary", "untuned"]
    settings = settings_for(workspace, ranking={"baselines": names, "rankers": ["mllm_msr", "tallrec"]})
    scores = {}
    for protocol in ("uniform", "popular"):
        tables = [
            (Scored("mllm_msr", "mllm_msr", 1, "shuffled_image", protocol), 0.1),
            (Scored("untuned", "mllm_msr", None, None, protocol), 0.1),
            *((Scored(name, name, seed, None, protocol), 0.9) for name in ("mllm_msr", "tallrec") for seed in (1, 2)),
        ]
        for at, (table, strength) in enumerate(tables):
            path = tmp_path / protocol / f"{at}.parquet"
            scores[table] = write_scores(path, protocol, workspace, strength, at)
    output = tmp_path / "report"
    output.mkdir()
    counts = compare_ranking(settings, Workspace(workspace), scores, output)
    assert counts["uniform_targets"] == 10
    assert counts["uniform_auc_mllm_msr"] > 0.8
    results = json.loads((output / "results.json").read_text())
    for one in results["protocols"].values():
        assert [row["method"] for row in one["rows"]] == [*names, "mllm_msr", "tallrec", "mllm_msr, shuffled image"]
        found = {row["method"]: row["figures"]["all"]["user_auc"]["mean"] for row in one["rows"]}
        # the next note of the circle is known by its id; pictures and summaries tell its kind alone
        assert min(found["gru4rec"], found["sasrec"]) > 0.9
        assert min(found["gru4rec_image"], found["gru4rec_summary"]) > 0.55
    assert "mllm_msr, shuffled image" in (output / "table.txt").read_text()
    html = (output / "index.html").read_text(encoding="utf-8")
    assert html.count("The user likes kind") == 6
    assert html.count('class="badge">target') == 3
    assert "red round cat" in html
    assert "gru4rec_summary: mean of the last states" in html


def test_sequential_baselines_see_no_held_out_target(workspace):
    sequences, validation = training_data(settings_for(workspace), Workspace(workspace), published=False)
    assert sequences == [sequence_of(user)[: 6 if user < 40 else 5] for user in range(NUM_USERS)]
    assert validation == [(sequence_of(user)[:5], sequence_of(user)[5]) for user in range(40, 50)]


def test_split_by_time_nothing_later_than_the_first_validation_target_is_seen(workspace):
    settings = settings_for(workspace, candidates={"split_by": "time"})
    sequences, _ = training_data(settings, Workspace(workspace), published=False)
    # the users of days 0 to 39 train; user 40 gives the first validation target, at hour 5 of day 40
    assert sequences == [sequence_of(user)[: 6 if user < 40 else 5] for user in range(41)]


@pytest.mark.parametrize(
    ("held_out", "trained", "known"),
    [(set(), True, "abcd"), (set(), False, "abc"), ({"c"}, True, "ab"), ({"d", "b"}, False, "a"), ({"x"}, False, "")],
)
def test_what_may_be_known_of_a_sequence(held_out, trained, known):
    assert known_part(list("abcd"), held_out, trained=trained) == list(known)


def test_missing_tables_say_which_stage_to_run(workspace):
    with pytest.raises(DataError, match="run the sequences stage"):
        read_protocol(Workspace(workspace), "published")


def test_popularity_and_random_need_no_training(workspace):
    protocol = read_protocol(Workspace(workspace), "uniform")
    baselines = Baselines(settings_for(workspace), Workspace(workspace), [protocol], llm="", vision="")
    (clicks,) = baselines.scores("popularity", protocol).values()
    assert set(clicks) == {0, 1, 2}
    with pytest.raises(DataError, match="newest needs notes with created_at"):
        baselines.scores("newest", protocol)
    drawn = baselines.scores("random", protocol)
    assert list(drawn) == [1, 2]
    assert not np.array_equal(drawn[1], drawn[2])
