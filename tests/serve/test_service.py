"""The running service over HTTP, on a real Ray Serve."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tests.support import tiny_models
from tests.support.serving import user_in, wait_for

pytestmark = pytest.mark.slow

PARTS = ("index", "encoder", "writer", "users", "ranker", "preferences")


def similar(service, **body):
    return service.http.post("/v1/similar", json=body)


def on_both(service, condition):
    """Whether a condition holds for several answers in a row, which come from both replicas."""
    return wait_for(lambda: all(condition() for _ in range(12)))


def test_it_is_ready_and_names_its_replicas(service):
    assert service.http.get("/v1/health").json() == {"status": "ok"}
    assert service.http.get("/v1/ready").json() == {"ready": True, "reasons": [], "parts": dict.fromkeys(PARTS, True)}
    names = wait_for(lambda: [n for n in service.http.get("/v1/stats").json()["replicas"] if n.startswith("gateway")])
    wait_for(lambda: len([n for n in service.http.get("/v1/stats").json()["replicas"] if n.startswith("gateway")]) == 2)
    assert names


def test_similar_notes_are_the_exact_neighbours(service, world):
    vectors = world.vectors["embedding"]
    scores = vectors @ vectors[5]
    scores[5] = -2
    best = np.argsort(-scores)[:7]
    found = similar(service, note_id="n5", k=7).json()["results"]
    assert [one["note_id"] for one in found] == [f"n{row}" for row in best]
    np.testing.assert_allclose([one["score"] for one in found], scores[best], atol=1e-5)


def test_served_vectors_equal_the_encoders(service, world):
    note = world.notes[7]
    body = {"note_id": "x", "title": note.title, "topics": list(note.topics), "content": note.content}
    body["image"] = base64.b64encode(note.image).decode()
    answer = service.http.post("/v1/embeddings", json={"input": [body]}).json()
    np.testing.assert_allclose(answer["data"][0]["embedding"], world.vectors["embedding"][7], atol=1e-5)
    packed = service.http.post("/v1/embeddings", json={"input": [body], "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, world.vectors["embedding"][7], atol=1e-5)
    assert answer["usage"]["total_tokens"] > 0


def test_a_text_is_embedded_as_a_note_with_that_content(service, world):
    from notellm2_ray.core.schema import Note

    answer = service.http.post("/v1/embeddings", json={"input": ["a green house", "猫"]}).json()
    expected = world.encoder.encode([Note("a", content="a green house"), Note("b", content="猫")])
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], expected, atol=1e-5)


def test_a_written_note_is_found_by_every_replica_and_a_deleted_one_by_none(service, world):
    image = base64.b64encode(tiny_models.picture(99)).decode()
    note = {"note_id": "fresh/1", "title": "green house", "topics": ["travel"], "image": image}
    done = service.http.put("/v1/notes", json={"notes": [{**note, "created_at": "2026-05-01T10:00:00+02:00"}]}).json()
    assert done["upserted"] == 1 and done["rejected"] == []
    assert on_both(service, lambda: similar(service, note_id="fresh/1", k=1).status_code == 200)
    assert on_both(service, lambda: similar(service, note_id="fresh/1", k=1).json()["index"]["version"] >= done["seq"])
    card = service.http.get("/v1/notes/fresh/1").json()
    assert card["title"] == "green house" and card["has_image"] and card["created_at"] == "2026-05-01T08:00:00Z"
    picture = service.http.get("/v1/notes/fresh/1/image")
    assert picture.content == tiny_models.picture(99) and picture.headers["content-type"] == "image/png"
    gone = service.http.post("/v1/notes/delete", json={"note_ids": ["fresh/1", "never"]}).json()
    assert gone["deleted"] == 1 and gone["unknown"] == ["never"]
    assert on_both(service, lambda: similar(service, note_id="fresh/1", k=1).status_code == 404)
    assert service.http.get("/v1/notes/fresh/1").status_code == 404
    everything = similar(service, note_id="n0", k=100).json()["results"]
    assert "fresh/1" not in [one["note_id"] for one in everything]


def test_bad_notes_are_rejected_one_by_one(service):
    notes = [
        {"note_id": "good", "title": "red cat"},
        {"note_id": "no-base64", "image": "*"},
        {"note_id": "no-image", "image": base64.b64encode(b"text").decode()},
        {"note_id": "foreign", "image_url": "https://example.com/a.png"},
        {"note_id": "long", "title": "x" * 3000},
    ]
    done = service.http.put("/v1/notes", json={"notes": notes}).json()
    assert done["upserted"] == 1
    assert {one["note_id"] for one in done["rejected"]} == {"no-base64", "no-image", "foreign", "long"}
    assert all(one["reason"] for one in done["rejected"])
    service.http.post("/v1/notes/delete", json={"note_ids": ["good"]})


def test_filters(service, world):
    red = {note.note_id for note in world.notes if "red" in note.topics}
    found = similar(service, note_id="n9", k=50, filter={"topics_any": ["red"]}).json()["results"]
    assert {one["note_id"] for one in found} == red - {"n9"}
    both = similar(service, note_id="n9", k=50, filter={"topics_all": ["red", "cat"]}).json()["results"]
    assert both == []
    bounds = {"created_after": "2026-01-06T00:00:00Z", "created_before": "2026-01-08T00:00:00Z"}
    found = similar(service, note_id="n9", k=50, filter=bounds).json()["results"]
    assert {one["note_id"] for one in found} == {"n5", "n6"}
    found = similar(service, note_id="n9", k=3, filter={"exclude": [f"n{row}" for row in range(37)]}).json()["results"]
    assert {one["note_id"] for one in found} == {"n37", "n38", "n39"}


def test_explaining_adds_cards_and_modalities(service, world):
    for body in ({"note_id": "n5"}, {"note": {"note_id": "q", "title": "red cat 5"}}):
        first = similar(service, **body, k=1, explain=True).json()["results"][0]
        assert first["note"]["note_id"] == first["note_id"]
        assert set(first["by_modality"]) == {"image", "text"}
    expected = world.vectors["embedding_text"][5] @ world.vectors["embedding_text"][int(first["note_id"][1:])]
    first = similar(service, note_id="n5", k=1, explain=True).json()["results"][0]
    row = int(first["note_id"][1:])
    expected = world.vectors["embedding_text"][5] @ world.vectors["embedding_text"][row]
    assert first["by_modality"]["text"] == pytest.approx(float(expected), abs=1e-5)


def test_events_make_a_history_and_recommendations(service):
    ann = user_in("recalled", "ann/")
    events = [
        {"event_id": f"e{row}", "user_id": ann, "note_id": f"n{row}", "action": "click",
         "timestamp": f"2026-02-01T00:00:{row:02d}Z"}
        for row in (1, 2, 3, 4)
    ]  # fmt: skip
    bad = {"event_id": "bad", "user_id": ann, "note_id": "never", "action": "click"}
    late = {"user_id": ann, "note_id": "n1", "action": "click", "timestamp": "2126-01-01T00:00:00Z"}
    done = service.http.post("/v1/events", json={"events": [*events, bad, late]}).json()
    assert (done["accepted"], done["duplicates"]) == (4, 0)
    assert [one["index"] for one in done["rejected"]] == [4, 5]
    again = service.http.post("/v1/events", json={"events": events}).json()
    assert (again["accepted"], again["duplicates"]) == (0, 4)
    answer = service.http.post("/v1/recommend", json={"user_id": ann, "k": 5, "explain": True}).json()
    assert (answer["ranked_by"], answer["fallback"], answer["arm"]) == ("recall", "arm", "recalled")
    ids = [one["note_id"] for one in answer["results"]]
    assert len(ids) == 5 and not set(ids) & {"n1", "n2", "n3", "n4"}
    assert all(one["note"]["note_id"] == one["note_id"] and one["from_history"] for one in answer["results"])
    user = service.http.get(f"/v1/users/{ann}").json()
    assert [[card["note_id"] for card in block["notes"]] for block in user["blocks"]] == [["n1", "n2", "n3"]]
    assert [card["note_id"] for card in user["open_block"]] == ["n4"]
    assert ann in service.http.get("/v1/users", params={"limit": 5}).json()["users"]


def test_new_users_get_what_others_liked(service):
    event = {"event_id": "b1", "user_id": "bob", "note_id": "n8", "action": "click"}
    service.http.post("/v1/events", json={"events": [event]})
    answer = service.http.post("/v1/recommend", json={"user_id": "nobody", "k": 1}).json()
    assert len(answer["results"]) == 1 and answer["results"][0]["from_history"] == []
    assert service.http.get("/v1/users/nobody").status_code == 404
    given = service.http.post("/v1/recommend", json={"history": ["n1", "never"], "k": 3}).json()
    assert [one["from_history"] for one in given["results"]] == [["n1"]] * 3


def test_searching_titles(service):
    found = service.http.post("/v1/notes/search", json={"text": "CAT 1", "limit": 3}).json()["notes"]
    assert len(found) == 3 and all("cat 1" in one["title"] for one in found)
    assert service.http.post("/v1/notes/search", json={"text": "nothing like it"}).json() == {"notes": []}


HOSTILE = [
    ("POST", "/v1/similar", b"{", 400),
    ("POST", "/v1/similar", b'{"note_id": "n1", "k": 0}', 422),
    ("POST", "/v1/similar", b'{"note_id": "n1", "k": 1e999}', 422),
    ("POST", "/v1/similar", b'{"note_id": "n1", "k": ' + b"9" * 5000 + b"}", 400),
    ("POST", "/v1/similar", b'{"note_id": "n1", "k": NaN}', 422),
    ("POST", "/v1/similar", b'{"note_id": "\\ud800"}', 422),
    ("POST", "/v1/similar", b'{"note_id": "\\u0000"}', 422),
    ("POST", "/v1/similar", b'{"note_id": "n1", "filter": {"created_after": "9999-12-31T23:59:59-23:00"}}', 422),
    ("POST", "/v1/similar", b'{"note_id": "n1", "filter": {"created_after": "0001-01-01T00:00:00+01:00"}}', 422),
    ("POST", "/v1/similar", b'{"note_id": "n1", "filter": {"created_after": "2026-01-01T00:00:00"}}', 422),
    ("POST", "/v1/similar", '{"note_id": "n1"}'.encode("utf-16"), 400),
    ("POST", "/v1/similar", b"[" * 50_000, 422),
    ("POST", "/v1/similar", b'{"note_id": "n1"' + b" " * 300_000 + b"}", 413),
    ("POST", "/v1/similar", b"\xff\xfe", 400),
    ("POST", "/v1/similar", b"null", 422),
    ("PUT", "/v1/notes", b'{"notes": []}', 422),
    ("PUT", "/v1/notes", b'{"notes": [' + b",".join([b'{"note_id": "a"}'] * 9) + b"]}", 413),
    ("POST", "/v1/embeddings", b'{"input": [1, 2]}', 400),
    ("POST", "/v1/embeddings", b'{"input": "a", "model": "gpt"}', 400),
    ("POST", "/v1/recommend", b'{"user_id": "a", "history": []}', 422),
    ("POST", "/v1/recommend", b'{"user_id": "a", "k": 100000}', 422),
    ("POST", "/v1/events", b'{"events": [{"user_id": "", "note_id": "n1", "action": "click"}]}', 422),
    ("POST", "/v1/events", b'{"events": [{"user_id": "a", "note_id": "n1", "action": "click"}]}', 422),
    ("DELETE", "/v1/notes", b"", 405),
    ("GET", "/v1/nothing", b"", 404),
    ("GET", "/v1/notes/%00", b"", 422),
    ("GET", "/v1/users?limit=many", b"", 422),
    ("GET", "/ui/../../etc/passwd", b"", 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), HOSTILE)
def test_hostile_requests_get_typed_errors(service, method, path, body, status):
    headers = {"content-type": "application/json"}
    answer = service.http.request(method, path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "param", "code"} and error["type"] and error["message"]


def test_the_openapi_document_describes_the_answers(service):
    document = service.http.get("/openapi.json").json()
    assert {"/v1/notes", "/v1/similar", "/v1/recommend", "/v1/events", "/v1/embeddings"} <= set(document["paths"])
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            assert {"401", "422", "429"} <= set(described["responses"]), (path, method)
            wrong = described["responses"]["422"]["content"]["application/json"]["schema"]
            assert wrong["$ref"].endswith("ErrorAnswer")
    for path, method in (("/v1/similar", "post"), ("/v1/notes/{note_id}", "get"), ("/v1/users/{user_id}", "get")):
        assert "404" in document["paths"][path][method]["responses"], path


def test_figures(service):
    service.http.post("/v1/recommend", json={"user_id": user_in("recalled", "nobody")})
    service.http.post("/v1/similar", json={"k": 1})
    service.http.post("/v1/embeddings", json={"input": "a text"})

    def complete():  # the replicas exchange reports every two seconds
        stats = service.http.get("/v1/stats").json()
        wanted = "arm" in stats["fallbacks"] and "invalid_request" in stats["refused"]
        return stats if wanted and "/v1/similar" in stats["latency_ms"] else None

    stats = wait_for(complete)
    assert stats["stage_ms"]["search"]["count"] > 0 and stats["batch_sizes"]["encoder"]["count"] > 0
    text = service.http.get("/metrics").text
    assert "notellm2_http_requests_total{" in text and text.count("# TYPE notellm2_http_seconds histogram") == 1
    assert '"n5"' not in text


def test_neither_keys_nor_notes_are_in_the_log(service):
    service.http.post("/v1/similar", json={"note": {"note_id": "q", "title": "very-secret-title"}})
    assert "very-secret-title" not in service.log()


def test_only_ray_listens_beyond_loopback_and_it_requires_a_token(service):
    from notellm2_ray.serve.doctor import examine

    finding = examine(service.process.pid, service.spec.serve.port)
    assert {one.kind for one in finding.listeners} <= {"ray", "other"}
    assert all(one.token for one in finding.listeners if one.kind == "ray")
