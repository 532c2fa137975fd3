"""The users' deployment around its store: popular notes, views, preferences; also the lift of an experiment."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from notellm2_ray import cli
from notellm2_ray.core.history_blocks import MINUTE, BlockRule
from notellm2_ray.core.settings.serve import LimitSettings, ServeSettings
from notellm2_ray.serve.calls import EngineCalls
from notellm2_ray.serve.deployments import users as users_module
from notellm2_ray.serve.deployments.preferences import Preferences
from notellm2_ray.serve.deployments.users import Users
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.schemas import Event, RecommendRequest
from notellm2_ray.serve.http.user_routes import Recommendation
from notellm2_ray.users.exposures import Exposure
from notellm2_ray.users.rows import UserEvent
from notellm2_ray.users.store import UserStore
from tests.support.live_notes import make_table

START = datetime(2024, 5, 1, tzinfo=UTC)


def event(user: str, note: str, minute: float = 0, **fields) -> UserEvent:
    return UserEvent(user, note, START + timedelta(minutes=minute), "click", **fields)


@pytest.fixture
def spec(tmp_path):
    return SimpleNamespace(
        users_file=tmp_path / "serving" / "users.sqlite",
        sequences=None,
        preferences=None,
        events=None,
        block_rule=BlockRule(3),
        actions=("click",),
    )


def test_popular_notes_are_counted_by_one_task_and_served_from_the_last_count_meanwhile(spec, monkeypatch):
    async def run():
        users = Users(spec)
        users.store.add_events([event("u", "a"), event("v", "a"), event("v", "b")])
        counts, go, count = [], threading.Event(), users.store.popular

        def slowly(limit):
            counts.append(limit)
            assert go.wait(10)
            return count(limit)

        monkeypatch.setattr(users.store, "popular", slowly)
        first = [asyncio.create_task(users.popular()) for _ in range(4)]
        await asyncio.sleep(0.05)
        go.set()
        assert await asyncio.gather(*first) == [["a", "b"]] * 4 and len(counts) == 1
        monkeypatch.setattr(users_module, "_POPULAR_SECONDS", -1.0)
        go.clear()
        users.store.add_events([event(user, "c") for user in "uvw"])
        assert [await asyncio.wait_for(users.popular(), 1) for _ in range(3)] == [["a", "b"]] * 3
        go.set()
        await users.counting
        assert users.popular_notes == ["c", "a", "b"] and len(counts) == 2

    asyncio.run(run())


def test_a_view_says_whether_it_has_all_seen_notes(spec, monkeypatch):
    monkeypatch.setattr(users_module, "_SEEN", 3)

    async def run():
        users = Users(spec)
        users.store.add_events([event("u", f"n{n}", n) for n in range(3)])
        assert (await users.view("u"))["all_seen"]
        users.store.add_events([event("u", "n3", 3)])
        assert not (await users.view("u"))["all_seen"]
        assert await users.seen("u", ["n0", "other", "n3"]) == ["n0", "n3"]
        assert await users.describe() == {"users": True}
        users.check_health()
        users.store.close()
        with pytest.raises(RuntimeError, match="has ended"):
            users.check_health()

    asyncio.run(run())


def test_users_whose_preference_keeps_failing_do_not_block_others(spec, monkeypatch):
    monkeypatch.setattr(users_module, "_AT_ONCE", 4)
    monkeypatch.setattr(users_module, "_LOOK_SECONDS", 0.01)

    async def advance(user_id, *_):
        if user_id.startswith("bad"):
            raise RuntimeError("too long for the model")
        return f"likes of {user_id}"

    async def run():
        users = Users(spec, SimpleNamespace(advance=SimpleNamespace(remote=advance)))
        for number in range(10):  # they wait longest, and are more than fit at once
            users.store.add_events([event(f"bad{number}", note, number) for note in "abc"])
        users.store.add_events([event("good", note, 100) for note in "abc"])
        users._start()
        async with asyncio.timeout(20):
            while users.store.preference("good") is None:
                await asyncio.sleep(0.02)
        assert users.store.preference("good") == (0, "likes of good")
        users.loop_task.cancel()

    asyncio.run(run())


def test_an_empty_preference_is_stored_and_the_next_block_is_due(spec, monkeypatch):
    monkeypatch.setattr(users_module, "_LOOK_SECONDS", 0.01)
    asked = []

    async def advance(user_id, block, previous, note_ids):
        asked.append((block, previous, note_ids))
        return "" if block == 0 else "cats"

    async def run():
        users = Users(spec, SimpleNamespace(advance=SimpleNamespace(remote=advance)))
        users.store.add_events([event("u", note, minute) for minute, note in enumerate("abcdef")])
        users._start()
        async with asyncio.timeout(20):
            while users.store.preference("u") != (1, "cats"):
                await asyncio.sleep(0.02)
        users.loop_task.cancel()

    asyncio.run(run())
    assert asked == [(0, None, ["a", "b", "c"]), (1, "", ["d", "e", "f"])]


def test_complete_blocks_without_a_preference_are_shown_as_blocks(spec):
    spec.block_rule = BlockRule(2, 10 * MINUTE)
    sent_now = (datetime.now(UTC) - START) / timedelta(minutes=1)

    async def run():
        users = Users(spec)
        minutes = {"a": 0, "b": 1, "c": 2, "d": 30, "e": sent_now}
        users.store.add_events([event("u", note, minute) for note, minute in minutes.items()])
        shown = await users.blocks("u")
        assert [block["note_ids"] for block in shown["blocks"]] == [["a", "b"], ["c"], ["d"]]
        assert [block["block"] for block in shown["blocks"]] == [0, 1, 2] and shown["open_block"] == ["e"]
        assert await users.blocks("nobody") is None

    asyncio.run(run())


@pytest.mark.parametrize(("previous", "kept"), [("likes cats", "likes cats"), (None, "")])
def test_a_block_whose_notes_are_all_deleted_keeps_the_preference_before_it(tmp_path, previous, kept):
    make_table(tmp_path / "live.lance")
    asked = []

    class Engine:
        async def advance(self, previous, items, **_):
            asked.append([item.title for item in items])
            return SimpleNamespace(preference="new")

    replica = Preferences.__new__(Preferences)
    replica.spec, replica.summaries = SimpleNamespace(directory=tmp_path), {}
    replica.engine = EngineCalls(Engine(), "engine")
    replica.figures = Figures("test")
    assert asyncio.run(replica.advance("u", 1, previous, ["gone", "away"])) == kept and asked == []
    assert asyncio.run(replica.advance("u", 1, previous, ["gone", "n1"])) == "new" and asked == [["0"]]


def test_new_users_get_the_most_popular_notes_that_still_exist():
    popular = [*(f"deleted{number}" for number in range(50)), "a", "seen", "b", "c"]

    async def call(method, most=None, *, seconds):
        assert method == "popular"
        return popular[:most]

    async def cards(note_ids):
        return {}

    gateway = SimpleNamespace(
        limits=LimitSettings(),
        settings=ServeSettings(),
        figures=Figures("test"),
        users=SimpleNamespace(call=call),
        index={"a", "b", "c", "seen"},
        ranker=None,
        cards=cards,
    )
    view = {"history": [], "seen": ["seen"], "all_seen": True, "preference": None}
    wanted = Recommendation(gateway, RecommendRequest(history=[], k=2))
    assert [one.note_id for one in asyncio.run(wanted._recall(view))] == ["a", "b"]


def test_an_event_needs_an_id_or_a_time():
    with pytest.raises(ValidationError, match="event_id or timestamp"):
        Event(user_id="u", note_id="n", action="click")
    assert Event(user_id="u", note_id="n", action="click", event_id="e").timestamp is None
    assert Event(user_id="u", note_id="n", action="click", timestamp=START).event_id is None


def lift(capsys, workspace, *arguments) -> list[str]:
    cli.main(["lift", f"workspace={workspace}", *arguments])
    return capsys.readouterr().out.splitlines()


def test_the_lift_of_an_arm_is_printed_with_its_interval(tmp_path, capsys):
    with pytest.raises(SystemExit, match="notellm2 serve"):
        lift(capsys, tmp_path)
    (tmp_path / "serving").mkdir()
    with UserStore(tmp_path / "serving" / "users.sqlite") as store:
        assert lift(capsys, tmp_path) == ["experiment default: no note was shown to a user yet"]
        for user in range(200):
            arm, every = ("plain", 10) if user % 2 else ("better", 4)
            shown = [Exposure(f"r{user}", f"u{user}", f"n{n}", n, "default", arm, START) for n in range(10)]
            store.submit_exposures(shown)
            clicked = [n for n in range(10) if (7 * user + n) % every == 0]
            store.add_events([event(f"u{user}", f"n{n}", user, request_id=f"r{user}") for n in clicked])
        arms = "serve.arms=[{name: plain, share: 0.5}, {name: better, share: 0.5}]"
        lines = lift(capsys, tmp_path, arms)  # with the database open in the service
    assert lines[0] == "experiment default" and lines[1].split()[:5] == [
        "arm",
        "users",
        "requests",
        "exposures",
        "clicks",
    ]
    plain, better = lines[2].split(), lines[3].split()
    assert plain == ["plain", "100", "100", "1,000", "100", "10.00%"]
    assert better[:5] == ["better", "100", "100", "1,000", "250"] and better[5:7] == ["25.00%", "+150.0%"]
    low, high = (float(one.strip("+%")) for one in (better[7], better[9]))
    assert 50 < low < 150 < high < 300
    assert [line.split()[0] for line in lift(capsys, tmp_path)[2:]] == ["better", "plain"]
