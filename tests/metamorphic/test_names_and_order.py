"""Nothing depends on what a note or user is called, on the order of rows, on files, or on events delivered twice.

The same small platform is described in several ways. Pairs, histories, blocks, candidates, splits, scores and tables
must be the same up to the names: byte for byte where a table is text, row by row in the same order where it is data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.baselines.ranking.data import RankingData, read_protocol
from notellm2_ray.baselines.ranking.table import RANKING_BASELINES
from notellm2_ray.baselines.recall.baseline import RecallData
from notellm2_ray.baselines.recall.table import RECALL_BASELINES
from notellm2_ray.core.config import build
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.words import note_text, tokenize
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.data.pairs.mine import mine
from notellm2_ray.data.sequences.make import make_sequences
from notellm2_ray.evaluate.ranking import tables as ranking_tables
from notellm2_ray.evaluate.ranking.results import MethodScores, evaluate_protocol
from notellm2_ray.evaluate.recall import tables as recall_tables
from notellm2_ray.evaluate.recall.results import MethodRanks, evaluate
from notellm2_ray.evaluate.recall.task import RetrievalTask
from notellm2_ray.pipeline.recall_comparison import read_test_notes
from tests.support.tiny_models import picture

START, DAY = 1_717_200_000, 86_400
NUM_NOTES, NUM_USERS = 150, 60
WORDS = ["harbour", "noodles", "sneakers", "puppy", "tent", "lipstick", "garden", "piano", "bicycle", "lantern"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Tables:
    """A platform's two tables, the files they are cut into, and how its notes are split."""

    notes: Rows
    events: Rows
    files: int = 1
    split: str = "notes"


def platform(step: int = 1) -> Tables:
    """Users with a taste of words; times are multiples of ``step`` seconds, so that with a day many are tied."""
    rng = np.random.default_rng(11)
    notes = []
    for number in range(NUM_NOTES):
        word, alike = WORDS[number % len(WORDS)], number // 10 in (3, 4)  # twenty notes: ten pairs of alike ones
        told = 1 if alike else number
        text = f"about {word} {'again' if alike else number}"
        notes.append(
            {
                "note_id": f"n{number:03}",
                "title": text,
                "topics": [word],
                "content": text * (told % 3),
                "image": picture(number % len(WORDS)) if told % 4 else None,
                "created_at": START + told % 10 * DAY,
            }
        )
    events = []
    for user in range(NUM_USERS):
        at = START + int(rng.integers(DAY))
        for _ in range(30):
            at += int(rng.integers(600, 40_000))
            old = [n for n in range(NUM_NOTES) if notes[n]["created_at"] < at - step]
            own = [n for n in old if n % len(WORDS) == user % len(WORDS)]
            note = int(rng.choice(own if own and rng.random() < 0.6 else old or [0]))
            event = {"user_id": f"u{user:02}", "note_id": f"n{note:03}", "session_id": f"s{user}-{at // DAY}"}
            events.append(event | {"timestamp": at // step * step, "action": "view"})
            if rng.random() < 0.6:
                events.append(event | {"timestamp": (at + 5) // step * step, "action": "click"})
    return Tables(notes, events)


def in_order(tables: Tables) -> Tables:
    """The events as a log, by time."""
    return replace(tables, events=sorted(tables.events, key=lambda event: event["timestamp"]), split="time")


def by_name(tables: Tables) -> Tables:
    """The events by user and note, as MovieLens has them: their order says nothing of time."""
    return replace(tables, events=sorted(tables.events, key=lambda event: (event["user_id"], event["note_id"])))


def _shuffled(rows: Rows, seed: int) -> Rows:
    return random.Random(seed).sample(rows, len(rows))


def new_name(name: str) -> str:
    """Another name; the order of names is reversed, and their lengths differ."""
    digits = "".join(str(9 - int(digit)) for digit in name if digit.isdigit())
    return f"{name[0]}-{digits}-{'x' * (int(digits) % 5)}"


def renamed(tables: Tables) -> Tables:
    keys = ("note_id", "user_id", "session_id")
    both = (tables.notes, tables.events)
    rows = [[{k: new_name(v) if k in keys else v for k, v in row.items()} for row in table] for table in both]
    return replace(tables, notes=rows[0], events=rows[1])


def shuffled(tables: Tables) -> Tables:
    return replace(tables, notes=_shuffled(tables.notes, 1), events=_shuffled(tables.events, 2))


def in_other_files(tables: Tables) -> Tables:
    return replace(tables, files=3)


def delivered_twice(tables: Tables) -> Tables:
    return replace(tables, events=tables.events + tables.events[::3])


def everything(tables: Tables) -> Tables:
    return in_other_files(shuffled(delivered_twice(renamed(tables))))


def write_prepared(tables: Tables, home: Path) -> None:
    """The tables as ``prepare`` leaves them."""
    for name, rows, schema in (("notes", tables.notes, NOTE_SCHEMA), ("events", tables.events, EVENT_SCHEMA)):
        (home / "prepared" / name).mkdir(parents=True)
        for part, piece in enumerate(np.array_split(np.arange(len(rows)), tables.files)):
            path = home / "prepared" / name / f"part-{part}.parquet"
            pq.write_table(_typed([rows[row] for row in piece], schema), path, row_group_size=400)


def _typed(rows: Rows, schema: pa.Schema) -> pa.Table:
    plain = [pa.field(f.name, pa.int64()) if pa.types.is_timestamp(f.type) else f for f in schema]
    micros = [{k: v * 10**6 if k in ("created_at", "timestamp") else v for k, v in row.items()} for row in rows]
    return pa.Table.from_pylist(micros, schema=pa.schema(plain)).cast(schema)


def prepare_by_the_verb(tables: Tables, home: Path) -> None:
    """The tables through ``notellm2 prepare``, in the formats of its source."""
    from notellm2_ray.pipeline.recall_stages import prepare

    for name, rows in (("notes", tables.notes), ("events", tables.events)):
        (home / "raw" / name).mkdir(parents=True)
        for part, piece in enumerate(np.array_split(np.arange(len(rows)), tables.files)):
            pq.write_table(pa.Table.from_pylist([rows[row] for row in piece]), home / "raw" / name / f"{part}.parquet")
    prepare(settings_of(home, tables.split))


def settings_of(home: Path, split: str) -> Settings:
    raw = {name: str(home / "raw" / name) for name in ("notes", "events")}
    baselines = ["random", "popularity", "newest"]
    values = {
        "workspace": str(home),
        "source": {"kind": "tabular", **raw},
        "pairs": {"window_days": None},
        "split": {"by": split, "test_share": 0.4, "test_notes": "new" if split == "notes" else "all"},
        "evaluate": {
            "cutoffs": [5, 20],
            "short_tokens": 6,
            "long_tokens": 9,
            "seeds": [1, 2],
            "baselines": ["bm25", "item_cf", "swing", "popularity", "random"],
        },
        "sequences": {"blocks_by": "session", "session_gap_minutes": 600},
        "candidates": {
            "protocols": ["uniform", "popular", "published"],
            "train_targets": "every_block",
            "test_share": 0.4,
        },
        "ranking": {"rankers": [], "controls": [], "baselines": baselines, "seeds": [1, 2]},
    }
    return build(Settings, values)


def made(tables: Tables, home: Path, prepare: Callable[[Tables, Path], None] = write_prepared) -> dict[str, Any]:
    """Everything that the stages make of the tables: files by name, and the printed tables."""
    prepare(tables, home)
    settings, workspace = settings_of(home, tables.split), Workspace(home)
    for directory in (workspace.pairs, workspace.sequences):
        directory.mkdir(parents=True, exist_ok=True)
    mine(workspace.prepared, workspace.pairs, settings.pairs, settings.split, 5)
    make_sequences(workspace.prepared, workspace.sequences, settings.sequences, settings.candidates, 5)
    found: dict[str, Any] = {}
    for directory in (workspace.pairs, workspace.sequences):
        for path in sorted(directory.rglob("*.parquet")):
            found[str(path.relative_to(home))] = pq.read_table(path).to_pylist()
        statistics = json.loads((directory / "statistics.json").read_text())
        found[f"{directory.name}/statistics"] = {k: v for k, v in statistics.items() if k != "unknown_note_events"}
    found["train_notes"] = NoteStore(workspace.train_notes).ids
    found["recall table"] = recall_table(settings, workspace)
    return found | {"ranking table": ranking_table(settings, workspace)}


def recall_table(settings: Settings, workspace: Workspace) -> str:
    notes = read_test_notes(workspace)
    lengths = {note_id: len(tokenize(note_text(note))) for note_id, note in notes.items()}
    clicks = pq.read_table(workspace.pair_popularity).to_pylist()
    clicked = {row["note_id"] for row in clicks if row["train_clicks"]}
    task = RetrievalTask.build(pq.read_table(workspace.test_pairs), list(notes), lengths, settings.evaluate, clicked)
    data = RecallData(task, notes, workspace, settings)
    vectors = np.array([_vector(note.title) for note in notes.values()], np.float32)
    rankings = [MethodRanks("untrained", "text", {7: task.embedding_ranks(np.array(list(notes)), vectors)})]
    for name in settings.evaluate.baselines:
        row = RECALL_BASELINES.get(name)
        rankings.append(MethodRanks(name, row.inputs, row.ranks(data), "baseline"))
    results = evaluate(task, rankings)
    return recall_tables.printed(results) + json.dumps(results["tests"], indent=1)


def _vector(text: str) -> np.ndarray:
    """A random direction for each word, which stands for an untrained embedder."""
    words = [np.random.default_rng(sum(map(ord, word))).standard_normal(16) for word in tokenize(text)]
    return (total := np.sum(words, axis=0)) / np.linalg.norm(total)


def ranking_table(settings: Settings, workspace: Workspace) -> str:
    protocols = [read_protocol(workspace, name) for name in settings.candidates.protocols]
    data = RankingData(settings, workspace, protocols, "", "")
    results = {}
    for protocol in protocols:
        methods = [
            MethodScores(name, "baseline", row(data, protocol))
            for name in settings.ranking.baselines
            if (row := RANKING_BASELINES.get(name).scores) is not None
        ]
        task = protocol.task
        results[task.protocol] = evaluate_protocol(task, methods, settings.ranking, 5)
    return ranking_tables.printed({"protocols": results})


def with_old_names(value: Any, names: Mapping[str, str]) -> Any:
    """A value with all ids replaced, also the user's in an example's id."""
    if isinstance(value, str):
        name, slash, number = value.partition("/")
        return names.get(name, name) + slash + number
    if isinstance(value, list):
        return [with_old_names(one, names) for one in value]
    return {k: with_old_names(v, names) for k, v in value.items()} if isinstance(value, dict) else value


def assert_same(base: dict[str, Any], other: dict[str, Any], tables: Tables) -> None:
    ids = {row[key] for rows in (tables.notes, tables.events) for row in rows for key in row if key.endswith("_id")}
    names = {new_name(name): name for name in ids}
    assert base.keys() == other.keys()
    for name, expected in base.items():
        assert with_old_names(other[name], names) == expected, name


@pytest.fixture(scope="module")
def unordered(tmp_path_factory) -> tuple[Tables, dict[str, Any]]:
    """Times of whole days, and rows in the order of names."""
    tables = by_name(platform(step=DAY))
    return tables, made(tables, tmp_path_factory.mktemp("unordered"))


@pytest.fixture(scope="module")
def ordered(tmp_path_factory) -> tuple[Tables, dict[str, Any]]:
    """A log in order of time, with many ties."""
    tables = in_order(platform(step=DAY))
    return tables, made(tables, tmp_path_factory.mktemp("ordered"))


@pytest.mark.parametrize("change", [renamed, shuffled, in_other_files, delivered_twice, everything])
def test_a_table_whose_order_says_nothing(unordered, tmp_path, change):
    tables, base = unordered
    assert base["sequences/statistics"]["tied_events"] > 300
    assert base["sequences/statistics"]["ties_follow"].startswith("a hash")
    assert_same(base, made(change(tables), tmp_path), tables)


@pytest.mark.parametrize("change", [renamed, in_other_files, delivered_twice])
def test_a_log_whose_order_decides_ties(ordered, tmp_path, change):
    tables, base = ordered
    assert base["sequences/statistics"]["tied_events"] > 300
    assert base["sequences/statistics"]["ties_follow"] == "the log"
    assert_same(base, made(change(tables), tmp_path), tables)


def test_a_log_without_ties_may_be_shuffled(tmp_path):
    tables = in_order(platform())
    base, other = made(tables, tmp_path / "base"), made(everything(tables), tmp_path / "other")
    statistics = base["sequences/statistics"]
    assert statistics["tied_events"] == 0
    for one in (base, other):
        one["sequences/statistics"].pop("ties_follow")  # there are none
    assert_same(base, other, tables)


def test_no_name_tells_a_target(unordered, ordered):
    """Among candidates, a note's name says nothing about which is the target, tied or not."""
    for _, base in (unordered, ordered):
        won = []
        rows = base["sequences/candidates/uniform.parquet"]
        targets = {row["example_id"]: row["note_id"] for row in rows if row["label"]}
        for row in rows:
            if not row["label"]:
                won.append(targets[row["example_id"]] > row["note_id"])
        assert 0.3 < np.mean(won) < 0.7


@pytest.mark.slow
def test_trained_baselines_give_the_same_table(tmp_path):
    tables = by_name(platform(step=DAY))
    printed = []
    for name, one in (("base", tables), ("other", everything(tables))):
        made(one, tmp_path / name)
        settings = settings_of(tmp_path / name, tables.split)
        ranking = settings.ranking.model_copy(update={"baselines": ("gru4rec", "sasrec"), "seeds": (1,)})
        printed.append(ranking_table(settings.model_copy(update={"ranking": ranking}), Workspace(tmp_path / name)))
    assert printed[0] == printed[1]


def test_a_trained_embedder_has_the_same_weights(tmp_path):
    """Its pairs, their order and what is read of them are the same, and so is every step."""
    import torch

    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun
    from tests.support import embedder_training, tiny_models

    llm, clip = tiny_models.save_llm(tmp_path / "llm"), tiny_models.save_clip(tmp_path / "clip")
    train = embedder_training.train_settings(max_steps=4, validate_every_steps=4)
    tables, weights = by_name(platform(step=DAY)), []
    for name, one in (("base", tables), ("other", everything(tables))):
        home = tmp_path / name
        made(one, home)
        (home / "run").mkdir()
        job = EmbedderJob(tiny_models.settings(), train, 5, Workspace(home).pairs, llm, clip, home / "run")
        run = EmbedderRun(job, torch.device("cpu"), lambda directory, figures: None)
        run.run()
        weights.append(run.encoder.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("change", [renamed, everything])
def test_through_prepare(unordered, tmp_path, ray_cluster, change):
    tables, base = unordered
    assert_same(base, made(change(tables), tmp_path, prepare_by_the_verb), tables)
