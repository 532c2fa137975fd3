// Writing a note, and measuring how soon it is found.

import { api, ApiError, base64, picturePath, request } from "./api.js";
import { card, grid, number } from "./cards.js";
import { announce, button, clip, field, make, theirs } from "./dom.js";
import { forgetPicture, pictureInput } from "./pictures.js";
import { problem } from "./problems.js";
import { link } from "./route.js";

const PATIENCE_MS = 10_000;
const NEIGHBOURS = 12;

/** The form, filled with a stored note if there is an id. */
export async function write(params, signal) {
  const id = params.get("id");
  const note = id ? await api.note(id, signal) : null;
  const before = note?.has_image ? await fileOf(id, signal) : null;
  const outcome = make("div", { class: "outcome", "aria-live": "polite" });
  const form = noteForm(note, before, outcome);
  const nodes = [make("h1", { tabindex: "-1" }, note ? "Change a note" : "Write a note"), form, outcome];
  if (note) nodes.push(button("Delete it", () => attempt(outcome, () => remove(id, outcome)), { class: "danger" }));
  return { title: note ? "Change a note" : "Write a note", said: "", nodes };
}

async function fileOf(id, signal) {
  return new File([await (await request("GET", picturePath(id), undefined, signal)).blob()], "picture");
}

function noteForm(note, before, outcome) {
  const text = (name, value, more = {}) =>
    make("input", { name, value, autocomplete: "off", "data-key": name, ...more });
  const fresh = `page-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
  const inputs = {
    note_id: text("note_id", note?.note_id ?? fresh, { required: true, readonly: Boolean(note), maxlength: 256 }),
    title: text("title", note?.title ?? ""),
    topics: make("textarea", { name: "topics", rows: 2, "data-key": "topics" }, note?.topics.join("\n") ?? ""),
    content: make("textarea", { name: "content", rows: 5, "data-key": "content" }, note?.content ?? ""),
  };
  const file = pictureInput(before);
  const send = make("button", { type: "submit", "data-key": "send" }, "Write it");
  const submit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    await attempt(outcome, async () => put(await draftOf(inputs, file, note), outcome));
    send.disabled = false;
  };
  return make(
    "form",
    { class: "panel", on: { submit, paste: file.pasted } },
    field("Id", inputs.note_id, "An existing note with this id is replaced."),
    field("Title", inputs.title),
    field("Topics", inputs.topics, "One per line."),
    field("Text", inputs.content),
    file.node,
    send,
  );
}

async function draftOf(inputs, file, note) {
  const image = file.chosen();
  return {
    note_id: inputs.note_id.value.trim(),
    title: inputs.title.value.trim(),
    topics: inputs.topics.value
      .split("\n")
      .map((topic) => topic.trim())
      .filter(Boolean),
    content: inputs.content.value.trim(),
    image: image ? await base64(image) : null,
    created_at: note?.created_at ?? new Date().toISOString(),
  };
}

// Runs an action and shows its failure in `outcome`.
async function attempt(outcome, action) {
  outcome.replaceChildren(make("p", { class: "waiting-text" }, "Working…"));
  try {
    await action();
  } catch (error) {
    const giveKey = () => document.getElementById("key-button").click();
    outcome.replaceChildren(problem(error, { giveKey }));
    markField(outcome, error.param);
  }
}

function markField(outcome, param) {
  for (const input of outcome.parentElement?.querySelectorAll("[name]") ?? []) {
    const blamed = Boolean(param) && param.split(".").includes(input.getAttribute("name"));
    if (blamed) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
}

async function put(note, outcome) {
  const started = performance.now();
  const written = await api.upsert(note);
  if (written.rejected.length) throw new ApiError(200, "invalid_request", written.rejected[0].reason);
  const committed = performance.now() - started;
  forgetPicture(note.note_id);
  const { found, rank, waited } = await findAgain(note, started);
  const times = `On disk after ${ms(committed)}, found by its content after ${ms(waited)} (place ${rank + 1}).`;
  announce(times);
  outcome.replaceChildren(
    make("h2", {}, "Found again"),
    make("p", { class: "ranked", "data-committed": Math.round(committed), "data-found": Math.round(waited) }, times),
    make("p", { class: "hint" }, `Commit ${written.seq}; the index answered at commit ${found.index.version}.`),
    grid(
      found.results.map((result) => foundCard(result, note.note_id)),
      "The new note and its neighbours",
    ),
    make(
      "div",
      { class: "row" },
      make("a", { class: "chip", href: link("note", { id: note.note_id }) }, "Show its neighbours"),
      button("Delete it", () => attempt(outcome, () => remove(note.note_id, outcome)), { class: "danger" }),
    ),
  );
}

// Searches by the note's content, not by its id, until the note is among the results.
async function findAgain(note, started) {
  while (performance.now() - started < PATIENCE_MS) {
    const found = await api.similar({ note, k: NEIGHBOURS, explain: true });
    const rank = found.results.findIndex((result) => result.note_id === note.note_id);
    if (rank >= 0) return { found, rank, waited: performance.now() - started };
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new ApiError(0, "internal", `The note was written, but no search found it within ${ms(PATIENCE_MS)}.`);
}

function foundCard(result, id) {
  const note = result.note ?? { note_id: result.note_id, title: "", topics: [], has_image: false };
  const below = [make("p", { class: "score" }, "similarity ", make("strong", {}, number(result.score, 3)))];
  return card(note, { below, mark: result.note_id === id ? "yours" : null });
}

async function remove(id, outcome) {
  const started = performance.now();
  const { deleted, seq } = await api.remove(id);
  forgetPicture(id);
  const gone = await isGone(id, started);
  const times = deleted
    ? `Deleted (commit ${seq}); no search found it any more after ${ms(gone)}.`
    : "It had already been deleted.";
  announce(times);
  outcome.replaceChildren(
    make("h2", {}, "Deleted"),
    make("p", { class: "ranked", "data-gone": Math.round(gone) }, theirs("bdi", clip(id, 120)), " – ", times),
  );
}

async function isGone(id, started) {
  while (performance.now() - started < PATIENCE_MS) {
    try {
      await api.similar({ note_id: id, k: 1 });
    } catch (error) {
      if (error.status === 404) return performance.now() - started;
      throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new ApiError(0, "internal", `The note was deleted, but searches still find it after ${ms(PATIENCE_MS)}.`);
}

function ms(value) {
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}
