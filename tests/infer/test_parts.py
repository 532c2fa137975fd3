"""The store of resumable parts: a part is finished or absent, whatever goes wrong while it is written or read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_ray.core.errors import ModelError, OutputError
from notellm2_ray.core.schema import QUARANTINE_SCHEMA
from notellm2_ray.infer.part_actors import MAX_ATTEMPTS, PartActor, finished_of
from notellm2_ray.infer.parts import FinishedPart, PartStore, quarantine_table, require_one_model, whole_file


@dataclass(frozen=True, kw_only=True)
class Counted(FinishedPart):
    rows: int
    note: str = ""


ROWS = pa.table({"id": ["a", "b", "c"]})
BAD = quarantine_table("notes", "a file", [("d", "too large"), ("e", "empty")])


@pytest.fixture
def store(tmp_path: Path) -> PartStore[Counted]:
    made = PartStore(tmp_path, Counted)
    made.clear_leftovers([])
    return made


def record(part_id: str, model: str = "m1") -> Counted:
    return Counted(part_id=part_id, model_fingerprint=model, rows=3, note="é, ü")


def files(store: PartStore[Counted]) -> set[str]:
    return {str(path.relative_to(store.output)) for path in store.output.rglob("*") if path.is_file()}


def test_a_part_is_absent_until_it_is_committed_and_then_read_back(store: PartStore[Counted]) -> None:
    assert store.finished("000000") is None and store.part_ids() == []
    assert (store.begin_attempt("000000"), store.begin_attempt("000000")) == (1, 2)
    assert store.commit(record("000000"), ROWS, BAD) == record("000000") == store.finished("000000")
    assert files(store) == {"parts/000000.parquet", "quarantine/000000.parquet"}, "the count of attempts is gone"
    assert store.rows("000000").equals(ROWS)
    assert store.quarantined("000000").schema.equals(QUARANTINE_SCHEMA)
    assert store.first_reasons() == ["d: too large", "e: empty"]
    assert store.first_reasons("{reason}", limit=1, leave_out="too large") == ["empty"]
    store.commit(record("000001"), ROWS.slice(0, 1), BAD.slice(0, 0))
    assert store.quarantined("000001") is None, "an empty quarantine leaves no file"
    store.commit(record("000001"), ROWS.slice(0, 1), BAD)
    store.commit(record("000001"), ROWS.slice(0, 1))
    assert store.quarantined("000001") is None, "nothing is left of an earlier attempt"
    assert [len(table) for table in store.tables(["000001", "000000"])] == [1, 3]


def test_leftovers_are_half_written_files_and_parts_of_another_job(store: PartStore[Counted]) -> None:
    for part_id in ("kept", "other-model"):
        store.commit(record(part_id), ROWS, BAD)
    (store.folder / "kept.parquet.1234.partial").write_bytes(b"PAR1 half")
    (store.quarantine / "new.parquet.1234.partial").write_bytes(b"")
    store.begin_attempt("new")
    (store.folder / "README").write_text("somebody else's")
    assert store.clear_leftovers(["kept", "new"]) == 1
    assert files(store) == {"parts/kept.parquet", "quarantine/kept.parquet", "parts/README"}
    assert store.begin_attempt("new") == 1, "attempts are counted for each run"


@pytest.mark.parametrize("damage", [b"", b"half", b"PAR1 and then nothing", None])
def test_damaged_files_are_named_and_never_taken_for_finished_parts(store: PartStore[Counted], damage) -> None:
    store.commit(record("000000"), ROWS, BAD)
    path, quarantine = store.path("000000"), store.quarantine_path("000000")
    for file in (path, quarantine):
        file.write_bytes(file.read_bytes()[:-20] if damage is None else damage)
    for file, read in ((path, store.finished), (path, store.rows), (quarantine, store.quarantined)):
        with pytest.raises(OutputError, match=f"{file} is damaged (?s:.*)delete it and run the command again"):
            read("000000")


def test_damaged_rows_behind_a_whole_footer_are_noticed_when_they_are_read(store: PartStore[Counted]) -> None:
    path = store.path("000000")
    store.commit(record("000000"), pa.table({"id": [f"note {i}" for i in range(1000)]}))
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    assert store.finished("000000") == record("000000")
    with pytest.raises(OutputError, match="000000.parquet is damaged"):
        store.rows("000000")
    path.unlink()
    with pytest.raises(OutputError, match="000000.parquet"):
        store.rows("000000")


def test_a_file_of_another_version_is_made_again(store: PartStore[Counted]) -> None:
    pq.write_table(ROWS.replace_schema_metadata({"notellm2.counts": "3"}), store.path("000000"))
    assert store.finished("000000") is None
    store.commit(record("000000"), ROWS)
    assert store.finished("000000") == record("000000")


def test_parts_of_two_models_are_not_joined(store: PartStore[Counted]) -> None:
    assert require_one_model([record("0"), record("1")], store.output) == "m1"
    with pytest.raises(ModelError, match=r"made by 2 different models \(m1, m2\)"):
        require_one_model([record("0"), record("1", "m2")], store.output)


@pytest.mark.parametrize("step", ["write_table", "fsync", "replace"])
def test_a_full_disk_leaves_the_part_unfinished(
    store: PartStore[Counted], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.begin_attempt("000000")
    with monkeypatch.context() as patch:
        patch.setattr(pq if step == "write_table" else os, step, full)
        with pytest.raises(OSError, match="No space left"):
            store.commit(record("000000"), ROWS, BAD)
    assert store.finished("000000") is None and files(store) == {"parts/000000.attempts"}
    assert store.begin_attempt("000000") == 2
    store.commit(record("000000"), ROWS, BAD)
    assert store.finished("000000") == record("000000")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full_raises_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r": opened("/dev/full" if "w" in mode else path, mode))
    with pytest.raises(OSError, match="No space left") as caught, whole_file(tmp_path / "file") as file:
        file.write(b"x" * 100_000)
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "file").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.infer.test_parts import BAD, ROWS, Counted, PartStore, record

store, replace, done = PartStore(Path(sys.argv[1]), Counted), os.replace, []

def replace_or_die(*paths):
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(replace(*paths))

os.replace = replace_or_die
store.begin_attempt("000000")
store.commit(record("000000"), ROWS, BAD)
"""


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_kill_before_the_last_rename_leaves_the_part_unfinished(store: PartStore[Counted], renamed: int) -> None:
    arguments = [sys.executable, "-c", KILLED, str(store.output), str(Path(__file__).parents[2]), str(renamed)]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert store.finished("000000") is None and store.quarantine_path("000000").exists() == bool(renamed)
    assert sum(name.endswith(".partial") for name in files(store)) == 1
    assert store.begin_attempt("000000") == 2, "the attempt that killed its process is counted"
    store.clear_leftovers(["000000"])
    store.commit(record("000000"), ROWS, BAD)
    assert files(store) == {"parts/000000.parquet", "quarantine/000000.parquet"}


@dataclass(frozen=True)
class _Part:
    part_id: str


class _Actor(PartActor):
    part_type, finished_type = _Part, Counted

    def __init__(self, parts: PartStore[Counted], failure: Exception | None = None) -> None:
        self.parts, self.failure, self.calls = parts, failure, 0

    def store(self, part):
        return self.parts

    def describe(self, part):
        return f"part {part.part_id} (lower this and that)"

    def make(self, part):
        self.calls += 1
        if self.failure:
            raise self.failure
        return self.parts.commit(record(part.part_id), ROWS)


def made(actor: _Actor) -> Counted:
    (row,) = actor(pa.table({"part_id": ["000000"]})).to_pylist()
    assert row["output"] == str(actor.parts.output)
    return finished_of(row, Counted)


def test_an_actor_makes_a_part_once(store: PartStore[Counted]) -> None:
    first, second = _Actor(store), _Actor(store)
    assert made(first) == made(second) == record("000000")
    assert (first.calls, second.calls) == (1, 0)


@pytest.mark.parametrize("error", [ModelError("broken"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_stops_an_actor_reaches_the_driver(store: PartStore[Counted], error: Exception) -> None:
    with pytest.raises(type(error), match="broken|No space left") as caught:
        made(_Actor(store, error))
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def test_a_part_that_keeps_killing_its_actor_ends_the_job(store: PartStore[Counted]) -> None:
    for _ in range(MAX_ATTEMPTS):
        store.begin_attempt("000000")
    with pytest.raises(ModelError, match=r"4 actors died while they worked on part 000000 \(lower this and that\)"):
        made(_Actor(store))
