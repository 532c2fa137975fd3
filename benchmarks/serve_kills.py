"""What is lost when processes of the service, or the whole cluster, are killed under load.

    python benchmarks/serve_kills.py [--kills 50] [--clusters 4]

Without a pause, writers upsert and delete notes and send events (each event twice), and readers search and ask for
recommendations. Meanwhile replicas of every deployment are killed (SIGKILL) in turn. Now and then the whole process
tree is killed, and started again on the same directory. At the end every acknowledged write is looked up, the users'
database is counted, and then the acknowledged events are sent once more. Nothing acknowledged may be missing, nothing
may be there twice, and no request may have waited longer than its time-out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import random
import sqlite3
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

TIMEOUT = 60.0  # an answer that takes longer counts as a hang
BETWEEN = 2.0  # seconds of load between a recovery and the next kill
NOTES = 12  # notes that a user clicks, each once: four blocks


class Load:
    """Clients that never pause, and the answers they got."""

    def __init__(self, url: str) -> None:
        self.url, self.stop = url, threading.Event()
        self.upserted: set[str] = set()
        self.deleted: set[str] = set()
        self.sent: dict[str, dict[str, Any]] = {}  # events by id, acknowledged or not
        self.acknowledged: set[str] = set()
        self.answers: collections.Counter[str] = collections.Counter()
        self.hangs, self.numbers, self.lock = 0, itertools.count(), threading.Lock()
        self.threads = [threading.Thread(target=run) for run in (self.notes, self.notes, self.events, self.reads)]
        for thread in self.threads:
            thread.start()

    def ask(self, http: httpx.Client, method: str, path: str, body: Any) -> Any:
        """The body of a 200; None for anything else."""
        try:
            answer = http.request(method, path, json=body)
        except httpx.TimeoutException:
            self.hangs += 1
            return None
        except httpx.HTTPError as error:
            self.answers[type(error).__name__] += 1
            time.sleep(0.05)
            return None
        self.answers[str(answer.status_code)] += 1
        return answer.json() if answer.status_code == 200 else None

    def notes(self) -> None:
        with self.client() as http:
            while not self.stop.is_set():
                ids = [f"w{next(self.numbers)}" for _ in range(4)]
                notes = [{"note_id": one, "title": "green house"} for one in ids]
                if self.ask(http, "PUT", "/v1/notes", {"notes": notes}):
                    self.upserted.update(ids)
                    if self.ask(http, "POST", "/v1/notes/delete", {"note_ids": ids[:1]}):
                        self.deleted.update(ids[:1])
                    else:
                        self.upserted.discard(ids[0])  # it may or may not be there

    def events(self) -> None:
        with self.client() as http:
            for number in itertools.count():
                if self.stop.is_set():
                    return
                event = {
                    "event_id": f"event-{number}",
                    "user_id": f"user{number // NOTES}",
                    "note_id": f"n{number % NOTES}",
                    "action": "click",
                    "timestamp": f"2026-02-{1 + number // 86_400:02d}T{number // 3600 % 24:02d}:"
                    f"{number // 60 % 60:02d}:{number % 60:02d}Z",
                }
                self.sent[event["event_id"]] = event
                for _ in range(2):
                    if self.ask(http, "POST", "/v1/events", {"events": [event]}):
                        self.acknowledged.add(event["event_id"])

    def reads(self) -> None:
        with self.client() as http:
            while not self.stop.is_set():
                self.ask(http, "POST", "/v1/similar", {"note_id": "n5", "k": 10})
                self.ask(http, "POST", "/v1/recommend", {"user_id": f"user{random.randrange(5)}", "k": 5})

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT, trust_env=False)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="replicas killed")
    parser.add_argument("--clusters", type=int, default=4, help="times that everything is killed")
    options = parser.parse_args()
    from _service import SMALL, Service, engines, make_world

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        spec = make_world(base / "world").spec(
            "serving",
            gateway=SMALL.model_copy(update={"replicas": 2}),
            preferences=SMALL,
            ranker=SMALL,
            spec_preference_engine=engines.make_preferences,
            spec_ranker_engine=engines.make_ranker,
        )
        service = Service(spec, base)
        load = Load(f"http://127.0.0.1:{spec.serve.port}")
        killed: collections.Counter[str] = collections.Counter()
        recoveries: dict[str, list[float]] = collections.defaultdict(list)
        order = itertools.cycle(("Gateway", "Writer", "Users", "Encoder", "Ranker", "Preferences"))
        every = max(1, options.kills // max(1, options.clusters))
        try:
            for number in range(1, options.kills + 1):
                time.sleep(BETWEEN)
                deployment = next(order)
                with contextlib.suppress(IndexError):
                    random.choice(service.replicas(deployment)).kill()
                    killed[deployment] += 1
                    recoveries[deployment].append(recovered(load, service))
                if number % every == 0 and killed["cluster"] < options.clusters:
                    tree = service._tree()
                    for one in (service.process, *tree):
                        with contextlib.suppress(Exception):
                            one.kill()
                    service.process.wait()
                    begun = time.monotonic()
                    service = Service(spec, base)
                    killed["cluster"] += 1
                    recoveries["cluster"].append(time.monotonic() - begun)
                done = len(load.upserted), len(load.acknowledged)
                print(f"{sum(killed.values())} kills, {done[0]} notes, {done[1]} events", flush=True)
            load.end()
            text, wrong = report(load, service, killed, recoveries)
            print(text)
            if wrong:
                raise SystemExit("something that was acknowledged is not as it should be")
        finally:
            load.end()
            service.stop()


def recovered(load: Load, service: Any) -> float:
    """Seconds until a write, an event and a search are answered again."""
    begun = time.monotonic()
    event = {"user_id": "p", "note_id": "n1", "action": "view", "event_id": f"probe-{begun}"}
    with load.client() as http:
        while time.monotonic() - begun < 120:
            try:
                fine = [
                    http.put("/v1/notes", json={"notes": [{"note_id": "probe", "title": "probe"}]}),
                    http.post("/v1/events", json={"events": [event]}),
                    http.post("/v1/similar", json={"note_id": "n5", "k": 1}),
                ]
                if all(one.status_code == 200 for one in fine):
                    return time.monotonic() - begun
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
    raise SystemExit("the service did not recover within 120 s")


def report(load: Load, service: Any, killed: Any, recoveries: Any) -> tuple[str, bool]:
    """Look everything up; the text to print, and whether anything is wrong."""
    with load.client() as http:
        lost = [one for one in load.upserted - load.deleted if http.get(f"/v1/notes/{one}").status_code != 200]
        back = [one for one in load.deleted if http.get(f"/v1/notes/{one}").status_code != 404]
        events = count_events(load, service)
        again = 0
        told = [load.sent[one] for one in load.acknowledged]
        for start in range(0, len(told), 500):
            done = http.post("/v1/events", json={"events": told[start : start + 500]}).json()
            again += done["accepted"]
    wrong = {
        "acknowledged notes lost": len(lost),
        "acknowledged deletions undone": len(back),
        **events,
        "acknowledged events that counted as new when they were sent again": again,
        f"requests without an answer within {TIMEOUT:g} s": load.hangs,
    }
    lines = [
        f"{sum(killed.values())} kills: " + ", ".join(f"{name} {count}" for name, count in killed.items()),
        f"{len(load.upserted)} notes and {len(load.deleted)} deletions acknowledged, {len(load.acknowledged)} events",
        "answers: " + ", ".join(f"{name} {count}" for name, count in load.answers.most_common()),
        "back to full service, median and longest: "
        + ", ".join(f"{name} {statistics.median(all_):.1f}/{max(all_):.1f} s" for name, all_ in recoveries.items()),
        *(f"{count} {what}" for what, count in wrong.items()),
    ]
    return "\n".join(lines), any(wrong.values())


def count_events(load: Load, service: Any) -> dict[str, int]:
    """How many events in the users' database are wrong, and in which way.

    It must be called before events are sent again, which would put lost ones back.
    """
    database = f"file:{service.spec.directory / 'users.sqlite'}?mode=ro"
    with contextlib.closing(sqlite3.connect(database, uri=True)) as rows:
        kept = [row[0] for row in rows.execute("SELECT event_id FROM events WHERE event_id LIKE 'event-%'")]
        liked = rows.execute("SELECT count(*) FROM sequence WHERE user_id LIKE 'user%'").fetchone()[0]
        blocks = rows.execute("SELECT user_id, note_ids FROM preferences WHERE user_id LIKE 'user%'").fetchall()
    held = set(kept)
    summed_up = collections.Counter((user, note) for user, notes in blocks for note in json.loads(notes))
    return {
        "acknowledged events lost": len(load.acknowledged - held),
        "events that nobody sent": len(held - load.sent.keys()),
        "events kept twice": len(kept) - len(held),
        "clicks too many or too few in histories": liked - len(held),
        f"clicks in two blocks, of {len(blocks)} summed up": sum(count > 1 for count in summed_up.values()),
    }


if __name__ == "__main__":
    main()
