"""The page in a real browser, over the running service: what a reader, a keyboard and a phone can do with it.

One module, long as it is: all of it shares one running service and one browser.
"""

from __future__ import annotations

import base64
import json
import re

import pytest

from notellm2_ray.serve.keys import create_key
from tests.support import page_world, tiny_models
from tests.support.page_world import HISTORY, LONG, Tab, add_hostile_notes, find_chromium, save_users
from tests.support.serving import SMALL

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
READER = "#/user?id=reader"


@pytest.fixture(scope="module")
def service(world, start, tmp_path_factory):
    """The service with keys, users, a ranker and hostile notes; ``read`` and ``write`` are its keys."""
    users = save_users(tmp_path_factory.mktemp("users"), world)
    spec = world.spec("page", auth="on", ranker=SMALL, spec_ranker_engine=page_world.Scorer, **users)
    keys = {scope: create_key(spec.keys_file, scope, ["read", scope]) for scope in ("read", "write")}
    service = start(spec)
    service.http.headers["authorization"] = f"Bearer {keys['write']}"
    add_hostile_notes(service.http)
    service.read, service.write = keys["read"], keys["write"]
    service.address = f"http://127.0.0.1:{spec.serve.port}"
    return service


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=page_world.FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_tab(browser, service):
    """A function that opens a tab of a context of its own; in the end each is checked."""
    tabs: list[Tab] = []

    def new_tab(**context) -> Tab:
        settings = {"viewport": {"width": 1280, "height": 900}, **context}
        tabs.append(Tab(browser.new_context(**settings), service.address))
        return tabs[-1]

    yield new_tab
    for tab in tabs:
        tab.check()
        tab.context.close()


@pytest.fixture
def tab(new_tab) -> Tab:
    return new_tab()


def titles(page) -> list[str]:
    return page.locator(".grid .card .title").all_inner_texts()


def pictures_loaded(page) -> None:
    """Wait until a picture is really shown."""
    page_world.wait_until(page, "() => [...document.querySelectorAll('.grid img')].some((one) => one.naturalWidth > 0)")


def test_searching_following_neighbours_and_going_back(tab, service):
    page = tab.open(key=service.read)
    page.get_by_role("searchbox").fill("red cat 1")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="11 notes for “red cat 1”").wait_for()
    page.get_by_role("link", name="red cat 12").click()
    page.get_by_role("heading", name="red cat 12", exact=True).wait_for()
    tab.settled()
    body = {"note_id": "n12", "k": 20, "explain": True}
    expected = service.http.post("/v1/similar", json=body).json()["results"]
    ids = page.locator(".grid .card").evaluate_all("all => all.map((one) => one.dataset.note)")
    assert ids == [one["note_id"] for one in expected]
    first = page.locator(".grid .card").first
    assert f"{expected[0]['score']:.3f}" in first.locator(".score").inner_text()
    for modality in ("image", "text"):
        shown = first.locator(f".bar.{modality} .bar-number").inner_text()
        assert shown == f"{expected[0]['by_modality'][modality]:.2f}".replace("-", "−")
    pictures_loaded(page)
    first.locator("a").click()
    page.wait_for_url(re.compile(rf"#/note\?id={ids[0]}$"))
    tab.settled()
    page.go_back()
    page.get_by_role("heading", name="red cat 12", exact=True).wait_for()
    tab.settled()
    focused = page.evaluate("document.activeElement.closest('.card')?.dataset.note")
    assert focused == ids[0]  # the link that was followed
    page.go_back()
    page.get_by_role("heading", name="11 notes for “red cat 1”").wait_for()
    assert page.get_by_role("searchbox").input_value() == "red cat 1"


def test_a_link_holds_the_whole_state(new_tab, service):
    address = "#/note?id=n9&k=10&topic=red&not=n2&from=2026-01-01&to=2026-02-20"
    page = new_tab().open(address, key=service.read)
    body = {"note_id": "n9", "k": 10}
    body["filter"] = {
        "topics_any": ["red"],
        "exclude": ["n2"],
        "created_after": "2026-01-01T00:00:00Z",
        "created_before": "2026-02-20T00:00:00Z",
    }
    expected = [one["note_id"] for one in service.http.post("/v1/similar", json=body).json()["results"]]
    assert expected and "n2" not in expected
    assert page.locator(".grid .card").evaluate_all("all => all.map((one) => one.dataset.note)") == expected


def test_filters_and_hiding(tab, service):
    page = tab.open("#/note?id=n9", key=service.read)
    page.locator(".filters summary").click()
    page.get_by_role("checkbox", name="red", exact=True).check()
    page.wait_for_url(re.compile("topic=red"))
    tab.settled()
    assert page.get_by_role("checkbox", name="red", exact=True).is_checked()
    ids = page.locator(".grid .card").evaluate_all("all => all.map((one) => one.dataset.note)")
    red = {
        note["note_id"]
        for one in ids
        for note in [service.http.get(f"/v1/notes/{one}").json()]
        if "red" in note["topics"]
    }
    assert set(ids) == red
    page.locator(".grid .card").first.get_by_role("button", name="Hide").click()
    page.wait_for_url(re.compile(f"not={ids[0]}"))
    tab.settled()
    assert page.evaluate("document.activeElement.textContent") == "Hide"  # of the card that moved up
    assert page.locator(f".grid .card[data-note={ids[0]}]").count() == 0
    page.get_by_role("button", name=f"Show {ids[0]} again").click()
    page.locator(f".grid .card[data-note={ids[0]}]").wait_for()
    page.get_by_label("Another topic").fill("nothing has this")
    page.get_by_role("button", name="Add").click()
    page.wait_for_url(re.compile("nothing"))
    tab.settled()
    page.get_by_role("checkbox", name="Notes must have all of these topics").check()
    page.get_by_text("No note matches these filters.").wait_for()
    page.get_by_role("link", name="Search without filters").click()
    page.locator(".grid .card").first.wait_for()


def test_pasting_a_note_with_a_picture(tab, service, world):
    page = tab.open("#/paste", key=service.read)
    note = world.notes[20]
    page.get_by_label("Title", exact=True).fill(note.title)
    page.get_by_label("Text", exact=True).fill(note.content)
    page.locator("input[type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": note.image})
    page.get_by_alt_text("Preview of the chosen picture").wait_for()
    page.get_by_role("button", name="Find its neighbours").click()
    page.locator(".grid .card").first.wait_for()
    pasted = {"note_id": "x", "title": note.title, "content": note.content}
    pasted["image"] = base64.b64encode(note.image).decode()
    expected = service.http.post("/v1/similar", json={"note": pasted, "k": 20}).json()["results"]
    ids = page.locator(".grid .card").evaluate_all("all => all.map((one) => one.dataset.note)")
    assert ids == [one["note_id"] for one in expected]
    page.reload()  # a link cannot contain a file: the page says so and searches with the rest
    page.get_by_text("a link cannot contain").wait_for()
    assert page.get_by_label("Title", exact=True).input_value() == note.title
    tab.failures_expected = True
    page.locator("input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    page.get_by_role("button", name="Find its neighbours").click()
    page.get_by_role("alert").filter(has_text="image").wait_for()


def test_user_view(tab, service):
    page = tab.open("#/users", key=service.read)
    page.get_by_role("link", name="reader").click()
    page.get_by_role("heading", name="User reader").wait_for()
    tab.settled()
    for block in ("Block 1", "Block 2"):
        region = page.get_by_role("region", name=block)
        assert region.locator(".card").count() == 3
        assert f"{page_world.TASTE} {block}." in region.locator(".taste").inner_text()
    assert page.get_by_role("region", name="Since then").locator(".card").count() == 1
    assert "Ranked by the language model" in page.locator(".ranked").inner_text()
    cards = page.get_by_role("list", name="Recommendations").locator(".card")
    assert cards.count() == 12
    assert cards.first.locator(".bar-number").inner_text() == "0.90"
    assert cards.first.locator(".reasons a").count() >= 1
    read = {f"n{row}" for row in range(HISTORY["reader"])}
    assert not read & set(cards.evaluate_all("all => all.map((one) => one.dataset.note)"))
    pictures_loaded(page)


def test_the_view_names_the_fallback(tab, service):
    page = tab.open(READER, key=service.read)
    page.get_by_label("Time budget (ms)").fill("1")
    page.get_by_role("button", name="Recommend").click()
    page.locator(".fallback").wait_for()
    assert page.locator(".fallback").get_attribute("data-fallback") == "budget"
    assert "time budget" in page.locator(".fallback").inner_text()
    assert page.get_by_role("list", name="Recommendations").locator(".score").first.inner_text().startswith("recall")


def test_users_of_all_kinds(tab, service):
    page = tab.open("#/user?id=waiting", key=service.read)
    assert page.get_by_text("has not been written yet").count() == 1
    page.goto(f"{service.address}/#/users")
    page.get_by_role("link", name='odd/"id"?&#').click()
    page.get_by_role("heading", name='User odd/"id"?&#').wait_for()
    tab.failures_expected = True
    page.goto(f"{service.address}/#/user?id=nobody")
    page.get_by_role("alert").filter(has_text="Not found").wait_for()


def test_a_written_note_is_found_again_and_deleted(tab, service):
    page = tab.open("#/write", key=service.write)
    page.get_by_label("Id", exact=True).fill("from the page/1")
    page.get_by_label("Title", exact=True).fill("a blue house by the sea")
    page.get_by_label("Topics").fill("house, by the\nsea")
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": tiny_models.picture(777)}
    page.locator("input[type=file]").set_input_files(picture)
    page.get_by_role("button", name="Write it").click()
    page.get_by_role("heading", name="Found again").wait_for()
    committed, found = (int(page.locator(".ranked").get_attribute(f"data-{one}")) for one in ("committed", "found"))
    assert 0 < committed <= found < 10_000
    assert page.locator(".grid .card", has_text="yours").get_attribute("data-note") == "from the page/1"
    stored = service.http.get("/v1/notes/from%20the%20page%2F1").json()
    assert stored["topics"] == ["house, by the", "sea"] and stored["has_image"]
    page.get_by_role("link", name="Show its neighbours").click()
    page.get_by_role("heading", name="a blue house by the sea").wait_for()
    page.get_by_role("link", name="Change or delete it").click()
    page.get_by_role("heading", name="Change a note").wait_for()
    assert page.get_by_label("Topics").input_value() == "house, by the\nsea"
    page.get_by_label("Title", exact=True).fill("a green house by the sea")
    page.get_by_role("button", name="Write it").click()
    page.get_by_role("heading", name="Found again").wait_for()
    stored = service.http.get("/v1/notes/from%20the%20page%2F1").json()
    assert stored["title"] == "a green house by the sea" and stored["has_image"]  # the picture is kept
    tab.failures_expected = True  # the search for the deleted note is a 404
    page.get_by_role("button", name="Delete it").first.click()
    page.get_by_role("heading", name="Deleted").wait_for()
    assert service.http.get("/v1/notes/from%20the%20page%2F1").status_code == 404


def test_keys(new_tab, service):
    tab = new_tab()
    tab.failures_expected = True
    page = tab.open()
    page.get_by_role("alert").filter(has_text="An API key is needed").wait_for()
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill("no key at all")
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("plain letters, digits and signs").wait_for()
    page.get_by_label("Key", exact=True).fill(service.read)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Find notes by their content").wait_for()
    tab.settled()
    page.get_by_role("link", name="Write", exact=True).click()
    page.get_by_role("button", name="Write it").click()
    page.get_by_role("alert").filter(has_text="does not allow that").wait_for()
    assert page.evaluate("Object.keys(localStorage).length") == 0 and page.context.cookies() == []
    page.get_by_role("button", name="API key, given").click()
    page.get_by_role("button", name="Forget it").click()
    page.goto(f"{service.address}/#/users")
    page.get_by_role("alert").filter(has_text="An API key is needed").wait_for()


def test_entering_a_key_late_keeps_what_was_typed(new_tab, service):
    tab = new_tab()
    tab.failures_expected = True
    page = tab.open("#/write", key=service.read)
    page.get_by_label("Title", exact=True).fill("a long day's work")
    note_id = page.get_by_label("Id", exact=True).input_value()
    page.get_by_role("button", name="Write it").click()
    page.get_by_role("alert").filter(has_text="does not allow that").wait_for()
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill(service.write)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="API key, given").wait_for()
    assert page.get_by_label("Title", exact=True).input_value() == "a long day's work"
    page.get_by_role("button", name="Write it").click()
    page.get_by_role("heading", name="Found again").wait_for()
    assert service.http.get(f"/v1/notes/{note_id}").json()["title"] == "a long day's work"
    service.http.post("/v1/notes/delete", json={"note_ids": [note_id]})
    keyless = new_tab()
    keyless.failures_expected = True
    page = keyless.open("#/write?id=n1")  # there is no form yet: the note is read with the key
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill(service.read)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Change a note").wait_for()


def test_waiting_and_empty_results_are_announced(tab, service):
    page = tab.open("#/users", key=service.read)
    waiting = []
    page.route("**/v1/notes/search", lambda route: waiting.append(route))
    page.get_by_role("searchbox").fill("nothing holds this")
    page.keyboard.press("Enter")
    page.locator("#progress").wait_for(state="visible")
    assert page.locator("main").get_attribute("aria-busy") == "true"
    page.get_by_role("searchbox").fill("typed meanwhile")
    page.wait_for_timeout(100)
    waiting.pop().continue_()
    page.get_by_text("No title, topic or id matches this.").wait_for()
    page.locator("#progress").wait_for(state="hidden")
    assert page.get_by_role("status").inner_text() == "0 notes found"
    assert page.get_by_role("searchbox").input_value() == "typed meanwhile"


def test_errors_and_faults_are_shown(tab, service):
    tab.failures_expected = True
    page = tab.open("#/note?id=n1&k=5000", key=service.read)
    page.get_by_role("alert").filter(has_text="k is at most 1000").wait_for()
    busy = {"error": {"type": "overloaded", "message": "the queue is full", "param": None}}
    answers = [
        {"status": 429, "headers": {"retry-after": "3"}, "body": json.dumps(busy)},
        {"status": 503, "body": "<html>"},
    ]
    page.route("**/v1/users?*", lambda route: route.fulfill(**answers.pop(0)) if answers else route.continue_())
    page.goto(f"{service.address}/#/users")
    page.get_by_role("alert").filter(has_text="Try again in 3 s.").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("alert").filter(has_text="not ready").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("link", name="reader").wait_for()
    page.route("**/v1/**", lambda route: route.abort())
    page.goto(f"{service.address}/#/note?id=n2")
    page.get_by_role("alert").filter(has_text="cannot be reached").wait_for()


def test_what_users_write_is_shown_as_text(tab, service):
    page = tab.open("#/search?q=attack", key=service.read)
    assert page_world.ATTACK in titles(page)
    page.goto(f"{service.address}/#/note?id=attack")
    page.get_by_role("heading", name="<img src=x").wait_for()
    tab.settled()
    page.goto(f"{service.address}/#/search?q={page_world.ATTACK.replace('#', '')}")
    page.locator("h1 bdi").wait_for()
    assert "owned" not in page.title()
    assert page.locator("main script, main img[src=x]").count() == 0
    page.goto(f"{service.address}/#/note?id=a%2Fb%3Fc%23d%26e%3D%22f%22")
    page.get_by_role("heading", name="an odd id cat").wait_for()
    tab.settled()


def test_an_answer_that_comes_too_late_is_not_shown(tab, service):
    page = tab.open("#/users", key=service.read)
    waiting = []
    page.route("**/v1/notes/search", lambda route: waiting.append(route))
    page.get_by_role("searchbox").fill("red cat")
    page.keyboard.press("Enter")
    page.locator("#progress").wait_for(state="visible")
    page.go_back()
    page.get_by_role("heading", name="Users").wait_for()
    tab.settled()
    page.wait_for_timeout(100)
    assert len(waiting) == 1
    page.unroute("**/v1/notes/search")
    page.wait_for_timeout(200)
    assert page.get_by_role("heading", level=1).inner_text() == "Users"


def test_the_browser_itself_forbids_markup_inline_scripts_and_other_hosts(new_tab, service):
    policy = service.http.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    tab = new_tab()
    page = tab.open("#/users", key=service.read)
    for attempt in (
        "document.body.innerHTML = '<p>markup</p>'",
        "document.createElement('script').src = 'http://127.0.0.2:9/x.js'",
        "fetch('http://127.0.0.2:9/')",
    ):
        with pytest.raises(Exception, match="TrustedHTML|TrustedScriptURL|Failed to fetch"):
            page.evaluate(attempt)
    assert page.locator(".chip").count() >= len(HISTORY)
    with pytest.raises(AssertionError):  # so the other tests would notice it too
        tab.check()
    tab.complaints.clear()
    tab.requests.clear()


@pytest.mark.parametrize(
    "address", ["", "#/search?q=a", "#/note?id=long", "#/paste?title=cat", "#/users", READER, "#/write"]
)
def test_a_phone_scrolls_in_one_direction(new_tab, service, address):
    tab = new_tab(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = tab.open(address, key=service.read)
    assert tab.wide_elements() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    if address == "#/note?id=long":
        assert page.get_by_role("heading", level=1).inner_text() == LONG
        assert not page.locator("details.filters").get_attribute("open")  # folded on a phone


def test_dark_and_light_can_be_read(new_tab, service):
    for scheme, dark in (("dark", True), ("light", False)):
        page = new_tab(color_scheme=scheme).open("#/note?id=n5", key=service.read)
        ground, text = (
            page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number)")
            for name in ("backgroundColor", "color")
        )
        assert (sum(ground) < 200) is dark
        assert contrast(ground, text) > 7
        for name in ("quiet", "accent", "bad-line"):
            page.evaluate(f"document.getElementById('status').style.color = 'var(--{name})'")
            colour = page.evaluate(
                "getComputedStyle(document.getElementById('status')).color.match(/\\d+/g).map(Number)"
            )
            assert contrast(ground, colour) > 4.5, name


def contrast(one, other) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour):
        parts = [value / 255 for value in colour]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_nothing_moves_if_reduced_motion_is_preferred(new_tab, service):
    page = new_tab(reduced_motion="reduce").open("#/users", key=service.read)
    names = page.evaluate("[...document.querySelectorAll('*')].map((one) => getComputedStyle(one).animationName)")
    assert set(names) == {"none"}


def test_the_keyboard_is_enough(tab, service):
    page = tab.open(key=service.read)
    press = page.keyboard.press
    focus = "document.activeElement"
    press("Tab")
    assert page.evaluate(f"{focus}.id") == "skip"
    assert page.evaluate(f"getComputedStyle({focus}).outlineStyle") != "none"
    press("Tab")
    press("Tab")
    assert page.evaluate(f"{focus}.id") == "query"
    page.keyboard.type("red cat 1")
    press("Enter")
    page.get_by_role("heading", name="11 notes for “red cat 1”").wait_for()
    tab.settled()
    assert page.evaluate(f"{focus}.tagName") == "H1"  # a screen reader reads it first
    press("Tab")
    ids = page.locator(".grid .card").evaluate_all("all => all.map((one) => one.dataset.note)")
    here = f"{focus}.closest('.card').dataset.note"
    assert page.evaluate(here) == ids[0]
    press("ArrowRight")
    assert page.evaluate(here) == ids[1]
    press("End")
    assert page.evaluate(here) == ids[-1]
    press("Home")
    press("ArrowDown")
    columns = page.evaluate("getComputedStyle(document.querySelector('.grid')).gridTemplateColumns.split(' ').length")
    assert page.evaluate(here) == ids[columns]
    press("ArrowUp")
    press("Enter")
    page.wait_for_url(re.compile(rf"#/note\?id={ids[0]}$"))
    tab.settled()
    press("Shift+Tab")  # the picture
    press("Enter")
    page.locator("#picture-dialog[open] img").wait_for()
    press("Escape")
    assert page.locator("#picture-dialog[open]").count() == 0
    page.locator(".filters summary").focus()
    press("Enter")
    press("Tab")
    assert page.evaluate(f"{focus}.name") == "topic"
    press("Escape")  # folds the filters
    assert not page.evaluate("document.querySelector('details.filters').open")
    assert page.evaluate(f"{focus}.tagName") == "SUMMARY"
    page.locator("#key-button").focus()
    press("Enter")
    page.locator("#key-dialog[open]").wait_for()
    press("Escape")
    assert page.evaluate(f"{focus}.id") == "key-button"


@pytest.mark.parametrize("address", ["", "#/note?id=n5", "#/paste", READER, "#/write"])
def test_every_control_has_a_name(tab, service, address):
    page = tab.open(address, key=service.read)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, textarea, img, dialog")].filter((one) => {
             const label = one.labels?.length || one.getAttribute("aria-label") || one.getAttribute("aria-labelledby");
             return !label && !one.textContent.trim() && !one.alt && one.id !== "picture-large";
           }).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    assert page.get_by_role("heading", level=1).count() == 1
