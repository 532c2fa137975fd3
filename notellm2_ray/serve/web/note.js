// Finding notes: by words, by a stored note, by a pasted one.

import { api, base64 } from "./api.js";
import { bar, card, grid, number, topics } from "./cards.js";
import { asked, chosen, panel, wanted } from "./filters.js";
import { button, clip, count, field, make, nameOf, theirs } from "./dom.js";
import { picture, pictureInput, pictureUrl } from "./pictures.js";
import { empty, problem } from "./problems.js";
import { go, link } from "./route.js";

const SEARCHED = 60;
const FOLDED = 240; // characters of a long text that are shown
const IN_ADDRESS = 1500; // characters; a longer pasted text is not put into the address but kept in this tab
const drafts = new Map(); // number -> {title, text, image}, what an address cannot hold

/** The start page: notes that many users liked. */
export async function home(_params, signal) {
  const head = make(
    "div",
    { class: "intro" },
    make("h1", { tabindex: "-1" }, "Find notes by their content"),
    make(
      "p",
      {},
      "Search for a note and go from neighbour to neighbour, ",
      make("a", { href: link("paste") }, "paste a note"),
      " of your own, see what a ",
      make("a", { href: link("users") }, "user"),
      " may like next, or ",
      make("a", { href: link("write") }, "write a note"),
      " and find it at once.",
    ),
  );
  const { results } = await api.recommend({ history: [], k: 24, explain: true }, signal);
  const notes = results.map((result) => result.note).filter(Boolean);
  const below = notes.length
    ? [
        make("h2", {}, "Liked by many"),
        grid(
          notes.map((note) => card(note, { below: [topics(note)] })),
          "Liked by many",
        ),
      ]
    : [empty("No user has liked a note yet. Search for a word in a title to begin.")];
  return { title: "Notes", said: `${count(notes.length, "note")} to begin with`, nodes: [head, ...below] };
}

/** Notes that match a text. */
export async function search(params, signal) {
  const text = params.get("q") ?? "";
  if (!text.trim()) return home(params, signal);
  const { notes } = await api.search(text, SEARCHED, signal);
  const cards = notes.map((note) => card(note, { below: [topics(note)] }));
  const many = notes.length >= SEARCHED ? `The first ${SEARCHED} notes` : count(notes.length, "note");
  return {
    title: `${clip(text, 40)} – search`,
    said: `${many} found`,
    nodes: [
      make("h1", { tabindex: "-1" }, `${many} for “`, theirs("bdi", clip(text, 120)), "”"),
      notes.length
        ? grid(cards, "Search results")
        : empty(
            "No title, topic or id matches this.",
            make("p", {}, make("a", { href: link("paste") }, "Paste a text"), " to search by meaning."),
          ),
    ],
  };
}

/** A note and its neighbours. */
export async function note(params, signal) {
  const id = params.get("id") ?? "";
  const body = { note_id: id, k: wanted(params), explain: true, filter: asked(params) };
  const [found, shown] = await Promise.all([api.similar(body, signal), api.note(id, signal)]);
  const base = { id };
  return {
    title: nameOf(shown),
    said: `${count(found.results.length, "neighbour")} of ${nameOf(shown)}`,
    nodes: [queryCard(shown), ...neighbours("note", base, params, found, shown)],
  };
}

function queryCard(shown) {
  const frame = shown.has_image
    ? button(picture(shown), () => enlarge(shown), {
        class: "frame",
        "aria-label": `Enlarge the picture of ${nameOf(shown)}`,
      })
    : picture(shown);
  const written = shown.created_at
    ? new Date(shown.created_at).toLocaleDateString(undefined, { dateStyle: "medium" })
    : null;
  return make(
    "article",
    { class: "query" },
    frame,
    make(
      "div",
      {},
      theirs("h1", shown.title.trim() || "(no title)", { tabindex: "-1" }),
      theirs("p", clip(shown.note_id, 300), { class: "hint" }),
      topics(shown, 30),
      content(shown.content),
      written ? make("p", { class: "hint" }, `Written ${written}`) : null,
      make("p", {}, make("a", { href: link("write", { id: shown.note_id }) }, "Change or delete it")),
    ),
  );
}

// A long text is folded, so that the neighbours are in view.
function content(text) {
  if (!text) return null;
  if (text.length <= FOLDED) return theirs("p", text, { class: "content" });
  const summary = make("summary", { "data-key": "text" }, theirs("bdi", clip(text, FOLDED)));
  return make("details", { class: "content" }, summary, theirs("p", text));
}

async function enlarge(shown) {
  const dialog = document.getElementById("picture-dialog");
  const large = document.getElementById("picture-large");
  large.alt = `Picture of ${nameOf(shown)}`;
  large.src = await pictureUrl(shown.note_id);
  dialog.showModal();
}

/** The filters, and the results of /v1/similar as a grid. */
function neighbours(view, base, params, found, own = null) {
  const notes = found.results.map((result) => result.note).filter(Boolean);
  const now = chosen(params);
  const cards = found.results.map((result, row) => neighbour(result, row, view, { ...base, ...now }));
  const apart = found.results.some((result) => result.by_modality);
  const { size, fresh } = found.index;
  const figures = `${count(size, "note")} in the index, ${fresh.toLocaleString("en")} of them new since it was built.`;
  return [
    make("h2", {}, `${count(found.results.length, "neighbour")}`),
    panel(view, base, params, own ? [own, ...notes] : notes),
    make(
      "p",
      { class: "hint" },
      figures,
      apart || !cards.length ? "" : " It has no separate vectors for image and text.",
    ),
    cards.length ? grid(cards, "Neighbours") : empty("No note matches these filters.", clearing(view, base)),
  ];
}

function clearing(view, base) {
  return make("p", {}, make("a", { href: link(view, base) }, "Search without filters"));
}

function neighbour(result, row, view, address) {
  const note = result.note ?? { note_id: result.note_id, title: "", topics: [], has_image: false };
  const why = result.by_modality;
  const below = [
    make("p", { class: "score" }, "similarity ", make("strong", {}, number(result.score, 3))),
    why ? make("div", { class: "why" }, bar("image", why.image), bar("text", why.text)) : null,
    topics(note),
  ];
  const hide = () => go(link(view, { ...address, not: [...address.not, note.note_id] }));
  return card(note, { below: below.filter(Boolean), hide, mark: String(row + 1) });
}

/** The neighbours of a pasted note, which is not stored. */
export async function paste(params, signal) {
  const draft = { title: "", text: "", image: null, ...drafts.get(params.get("draft")) };
  const title = params.get("title") ?? draft.title;
  const text = params.get("text") ?? draft.text;
  const nodes = [make("h1", { tabindex: "-1" }, "Paste a note"), pasteForm(title, text, draft.image)];
  const lost = params.get("draft") && !drafts.has(params.get("draft"));
  if (lost)
    nodes.push(empty("This search had a picture or a long text, which a link cannot contain: add it again."));
  if (!title && !text && !draft.image) return { title: "Paste a note", said: "", nodes };
  const note = { note_id: "pasted", title, content: text, image: draft.image ? await base64(draft.image) : null };
  const base = { title: params.get("title"), text: params.get("text"), draft: params.get("draft") };
  try {
    const body = { note, k: wanted(params), explain: true, filter: asked(params) };
    const found = await api.similar(body, signal);
    nodes.push(...neighbours("paste", base, params, found));
    return { title: "Pasted note", said: count(found.results.length, "neighbour"), nodes };
  } catch (error) {
    if (error.name === "AbortError") throw error;
    nodes.push(problem(error)); // below the form, which keeps what was typed
    return { title: "Paste a note", said: "", nodes };
  }
}

function pasteForm(title, text, image) {
  const titleInput = make("input", { name: "title", value: title, "data-key": "title", autocomplete: "off" });
  const textInput = make("textarea", { name: "text", rows: 4, "data-key": "text" }, text);
  const file = pictureInput(image);
  const submit = (event) => {
    event.preventDefault();
    go(pasteAddress(titleInput.value.trim(), textInput.value.trim(), file.chosen()));
  };
  return make(
    "form",
    { class: "panel", on: { submit, paste: file.pasted } },
    field("Title", titleInput),
    field("Text", textInput),
    file.node,
    make("button", { type: "submit", "data-key": "find" }, "Find its neighbours"),
  );
}

function pasteAddress(title, text, image) {
  const long = title.length + text.length > IN_ADDRESS;
  if (!long && !image) return link("paste", { title, text });
  const draft = String(Date.now());
  drafts.set(draft, { title, text, image });
  return link("paste", long ? { draft } : { title, text, draft });
}
