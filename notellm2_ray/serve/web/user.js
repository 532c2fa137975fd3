// A user: the notes they liked, their preferences in words, and what they may like next.

import { api } from "./api.js";
import { bar, card, grid, number, strip, topics } from "./cards.js";
import { clip, count, field, make, nameOf, theirs } from "./dom.js";
import { picture } from "./pictures.js";
import { empty, problem } from "./problems.js";
import { go, link } from "./route.js";

const SAMPLE = 60;
const REASONS = 3;
const FALLBACKS = {
  "not configured": "no ranker is deployed here",
  arm: "this user's arm of the experiment uses no ranker",
  "no history": "there is no history to rank by",
  budget: "the ranker did not finish within the time budget",
  overloaded: "the ranker was busy",
  failed: "the ranker failed",
};

/** Some users to choose from. */
export async function users(_params, signal) {
  const { users } = await api.users(SAMPLE, signal);
  const input = make("input", { name: "user", autocomplete: "off", required: true, "data-key": "user" });
  const submit = (event) => {
    event.preventDefault();
    if (input.value.trim()) go(link("user", { id: input.value.trim() }));
  };
  const links = users.map((id) =>
    make(
      "li",
      {},
      make("a", { class: "chip", href: link("user", { id }), "data-key": `user:${id}` }, theirs("bdi", clip(id, 60))),
    ),
  );
  return {
    title: "Users",
    said: count(users.length, "user"),
    nodes: [
      make("h1", { tabindex: "-1" }, "Users"),
      make("form", { class: "row", on: { submit } }, field("User id", input), make("button", {}, "Show")),
      links.length
        ? make("ul", { class: "chips", "aria-label": "Some users" }, links)
        : empty("There are no users yet. Send events to POST /v1/events."),
    ],
  };
}

/** One user. */
export async function user(params, signal) {
  const id = params.get("id") ?? "";
  const budget = Number(params.get("budget")) || undefined;
  const body = { user_id: id, k: Number(params.get("k")) || 12, explain: true, budget_ms: budget };
  const [known, answer] = await Promise.allSettled([api.user(id, signal), api.recommend(body, signal)]);
  for (const one of [known, answer]) if (one.reason?.name === "AbortError") throw one.reason;
  if (known.status === "rejected") throw known.reason;
  const read = [...known.value.blocks.flatMap((block) => block.notes), ...known.value.open_block];
  const next = answer.status === "fulfilled" ? recommendations(answer.value, read) : [problem(answer.reason)];
  return {
    title: `User ${clip(id, 40)}`,
    said: answer.status === "fulfilled" ? count(answer.value.results.length, "recommendation") : "",
    nodes: [
      make("h1", { tabindex: "-1" }, "User ", theirs("bdi", clip(id, 120))),
      make("h2", {}, "History"),
      history(known.value),
      make("h2", {}, "Next"),
      choices(id, params),
      ...next,
    ],
  };
}

function history({ blocks, open_block: open }) {
  if (!blocks.length && !open.length) return empty("This user has liked no note that still exists.");
  const parts = blocks.map((block) => historyBlock(`Block ${block.block + 1}`, block.notes, taste(block.preference)));
  if (open.length) {
    parts.push(historyBlock("Since then", open, make("p", { class: "hint" }, "This block is not full yet.")));
  }
  return make("div", { class: "history", role: "group", "aria-label": "History, oldest first" }, parts);
}

function historyBlock(name, notes, after) {
  return make(
    "section",
    { class: "block", "aria-label": name },
    make("h3", {}, name),
    notes.length ? strip(notes, `Notes of ${name}`) : make("p", { class: "hint" }, "Its notes were deleted."),
    after,
  );
}

function taste(preference) {
  if (preference) return theirs("blockquote", preference, { class: "taste" });
  return make("p", { class: "hint" }, "The preference after this block has not been written yet.");
}

function choices(id, params) {
  const input = make("input", {
    type: "number",
    name: "budget",
    min: 1,
    max: 60000,
    step: "any",
    value: params.get("budget"),
    placeholder: "default",
    "data-key": "budget",
  });
  const submit = (event) => {
    event.preventDefault();
    go(link("user", { id, k: params.get("k"), budget: input.value }));
  };
  return make(
    "form",
    { class: "row", on: { submit } },
    field("Time budget (ms)", input),
    make("button", { "data-key": "again" }, "Recommend"),
  );
}

function recommendations(answer, read) {
  const known = new Map(read.map((note) => [note.note_id, note]));
  const cards = answer.results.map((result, row) => recommended(result, row, known));
  return [
    how(answer),
    answer.preference
      ? make(
          "div",
          {},
          make("p", { class: "hint" }, "Because of this preference:"),
          theirs("blockquote", answer.preference, { class: "taste" }),
        )
      : null,
    cards.length ? grid(cards, "Recommendations") : empty("There is nothing left to recommend."),
    make("p", { class: "hint" }, `Arm ${answer.arm}, request ${answer.request_id}`),
  ].filter(Boolean);
}

function how(answer) {
  if (!answer.fallback) return make("p", { class: "ranked" }, "Ranked by the language model's P(yes).");
  const reason = FALLBACKS[answer.fallback] ?? answer.fallback;
  return make(
    "p",
    { class: "fallback", role: "note", "data-fallback": answer.fallback },
    `Ranked by recall only: ${reason}.`,
  );
}

function recommended(result, row, known) {
  const note = result.note ?? { note_id: result.note_id, title: "", topics: [], has_image: false };
  const score =
    result.p_yes === null
      ? make("p", { class: "score" }, "recall ", make("strong", {}, number(result.score)))
      : bar("P(yes)", result.p_yes);
  return card(note, {
    below: [score, reasons(result.from_history, known), topics(note)].filter(Boolean),
    mark: String(row + 1),
  });
}

function reasons(ids, known) {
  const notes = ids.map((id) => known.get(id)).filter(Boolean);
  if (!notes.length) return ids.length ? null : make("p", { class: "hint" }, "liked by many");
  const links = notes
    .slice(0, REASONS)
    .map((note) =>
      make(
        "li",
        {},
        make(
          "a",
          { href: link("note", { id: note.note_id }), title: nameOf(note), "aria-label": `Because of ${nameOf(note)}` },
          picture(note),
        ),
      ),
    );
  const more = notes.length - links.length;
  if (more > 0) links.push(make("li", {}, `+${more}`));
  return make("div", { class: "reasons" }, make("span", { class: "hint" }, "because of"), make("ul", {}, links));
}
