"""The same events give the same blocks and the same preference prompts offline (make-sequences) and online (the store).

Where the two differ on purpose: offline a user's last event is the target and in no block, and the block before it gets
a preference even if it is not full. Online a session ends by the clock too. Notes of one moment stand in order of
arrival online, and offline in the order of the log's rows.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from notellm2_ray.core.history_blocks import MINUTE, BlockRule
from notellm2_ray.core.recommend_prompts import Item, preference_prompt
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA
from notellm2_ray.core.settings import CandidateSettings, PreferenceSettings, SequenceSettings
from notellm2_ray.data.sequences.make import make_sequences
from notellm2_ray.infer.preference_plan import plan_chains
from notellm2_ray.infer.preference_steps import shorten
from notellm2_ray.users.rows import UserEvent
from notellm2_ray.users.store import UserStore

START = datetime(2024, 5, 1, tzinfo=UTC)
NOTES = [f"n{number:02d}" for number in range(30)]
TITLES = {note_id: f"a title of {note_id}, with more words than are shown" for note_id in NOTES[1:]}  # n00 has none
SUMMARIES = {note_id: f"what the image of {note_id} shows" for note_id in NOTES[::2]}
ALL = 1000  # more events than any user has
AT_LAST = START + timedelta(days=365)


@st.composite
def event_logs(draw, with_ties: bool) -> list[UserEvent]:
    """Six users, so that each side of the split has some; with ties many of a user's events lie at the same moment."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sessions = draw(st.sampled_from([[None], ["s1", "s2", "s3"], [None, "s1", "s2"]]))
    moments = draw(st.sampled_from([20, 200, 2000]))
    events = []
    for user in range(6):
        note_ids = rng.choice(NOTES, rng.integers(2, 12), replace=False)
        minutes = 2 * rng.choice(moments, len(note_ids), replace=with_ties)
        for note_id, minute in zip(note_ids.tolist(), minutes.tolist(), strict=True):
            at, session = START + timedelta(minutes=minute), sessions[rng.integers(len(sessions))]
            events.append(UserEvent(f"u{user}", note_id, at, str(rng.choice(["click", "view"])), session))
            events.append(UserEvent(f"u{user}", note_id, at + timedelta(minutes=1), "click", session))
    return events


def offline(folder: Path, events: list[UserEvent], knobs: SequenceSettings) -> Path:
    for name, schema, rows in [
        ("notes", NOTE_SCHEMA, [{"note_id": note_id, "title": "", "topics": [], "content": ""} for note_id in NOTES]),
        ("events", EVENT_SCHEMA, [event._asdict() for event in events]),
    ]:
        (folder / "prepared" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "prepared" / name / "part.parquet")
    (folder / "sequences").mkdir()
    candidates = CandidateSettings(protocols=("uniform",), num_negatives=1, validation_share=0.2, test_share=0.2)
    make_sequences(folder / "prepared", folder / "sequences", knobs, candidates, seed=0)
    return folder / "sequences" / "blocks.parquet"


def preference(user_id: str, block: int) -> str:
    return f"taste of {user_id} after {block}"


class Online:
    """The store, and what each block's preference was made from."""

    def __init__(self, path: Path, rule: BlockRule) -> None:
        self.users = UserStore(path, rule=rule, gather_seconds=0)
        self.read: dict[str, list[tuple[list[str], str | None]]] = {}

    def summarise(self, at: datetime) -> None:
        """Write all preferences that are due at a time."""
        while found := self.users.pending(at=at):
            for pending in found:
                read = self.read.setdefault(pending.user_id, [])
                assert pending.block == len(read)
                read.append((pending.note_ids, pending.previous))
                text = preference(pending.user_id, pending.block)
                assert self.users.save_preference(pending.user_id, pending.block, pending.fingerprint, text) == "saved"

    def blocks(self, user_id: str) -> list[list[str]]:
        """The blocks that a user's page shows."""
        history = self.users.history(user_id)
        blocks = [*(block.note_ids for block in history.blocks), *history.due, history.open_block]
        return [block for block in blocks if block]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    late=st.booleans(),
    blocks_by=st.sampled_from(["size", "session"]),
    size=st.integers(1, 4),
    gap=st.sampled_from([0.5, 10.0, 60.0]),
    variant=st.sampled_from(["recurrent", "no_image_summary"]),
)
def test_the_same_events_give_the_same_blocks_and_the_same_prompts(
    tmp_path_factory, data, late, blocks_by, size, gap, variant
):
    folder = tmp_path_factory.mktemp("both")
    knobs = SequenceSettings(blocks_by=blocks_by, block_size=size, session_gap_minutes=gap, max_events=ALL)
    events = data.draw(event_logs(with_ties=not late))
    events.sort(key=lambda event: event.timestamp)  # a log
    path = offline(folder, events, knobs)
    online = Online(folder / "users.sqlite", BlockRule.from_settings(knobs))
    with online.users as users:
        if late:  # out of order, but before any preference is made
            users.add_events(events[::-1])
        for event in [] if late else events:
            users.add_events([event])
            online.summarise(START)
        online.summarise(AT_LAST)
        shown = {event.user_id: online.blocks(event.user_id) for event in events}

    rows = pq.read_table(path).to_pylist()
    targets = {user: blocks[-1][-1] for user, blocks in shown.items()}
    for user, blocks in shown.items():
        before_target = [block for block in [*blocks[:-1], blocks[-1][:-1]] if block]
        assert [row["note_ids"] for row in rows if row["user_id"] == user] == before_target

    words = PreferenceSettings(variant=variant, max_title_words=4, max_summary_words=3)
    for chain in plan_chains(path, TITLES, SUMMARIES, words, "model").chains:
        for step, (note_ids, previous) in zip(chain.steps, online.read.get(chain.user, []), strict=False):
            # As in the deployment Preferences. Offline the target is not part of the history.
            known = [one for one in note_ids if one in TITLES and one != targets[chain.user]]
            items = [Item(TITLES[one], SUMMARIES.get(one)) for one in known]
            before = preference(chain.user, step.block - 1) if step.block else None
            assert prompt(previous, items, words) == prompt(before, step.items, words)


def prompt(previous: str | None, items: list[Item], words: PreferenceSettings) -> object:
    return preference_prompt("en", words.variant, previous, list(shorten(items, words)), words.template)


def test_online_notes_of_one_moment_stand_in_order_of_arrival(tmp_path):
    online = Online(tmp_path / "users.sqlite", BlockRule(3))
    with online.users as users:
        users.add_events([UserEvent("u", note_id, START, "click") for note_id in ("n2", "n1")])
        assert online.blocks("u") == [["n2", "n1"]]


def test_online_a_session_ends_by_the_clock_too(tmp_path):
    """Offline the session would go on, because its id appears again after the pause. Online that cannot be known."""
    online = Online(tmp_path / "users.sqlite", BlockRule(3, 10 * MINUTE))
    with online.users as users:
        users.add_events([UserEvent("u", "n1", START, "click", "s1")])
        online.summarise(START + timedelta(minutes=11))
        users.add_events([UserEvent("u", "n2", START + timedelta(minutes=20), "click", "s1")])
        assert online.blocks("u") == [["n1"], ["n2"]]
