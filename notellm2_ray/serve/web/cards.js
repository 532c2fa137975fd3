// Notes as cards in a grid that the arrow keys can move through.

import { button, clip, make, nameOf, theirs } from "./dom.js";
import { picture } from "./pictures.js";
import { link } from "./route.js";

/** A number for display, with a real minus sign. */
export function number(value, digits = 2) {
  return value.toFixed(digits).replace("-", "−");
}

/** "image ▇▇▇▁ 0.73"; `value` null: one of the two notes has no such vector. Below zero the bar is empty. */
export function bar(name, value) {
  const fill = make("span", { class: "fill" });
  fill.style.width = `${100 * Math.min(Math.max(value ?? 0, 0), 1)}%`;
  return make(
    "div",
    { class: `bar ${name}`, "data-modality": name },
    make("span", { class: "bar-name" }, name),
    make("span", { class: "track", "aria-hidden": "true" }, fill),
    make("span", { class: "bar-number" }, value === null || value === undefined ? "–" : number(value)),
  );
}

/**
 * A note as a list item with a link to its neighbours.
 * @param {Object} note a card of the API
 * @param {{below?: Array, hide?: Function|null, mark?: string|null}} parts `below`: nodes under the title; `hide`:
 *   called by the card's Hide button; `mark`: a word on the picture, for a card that can be hidden its place
 */
export function card(note, { below = [], hide = null, mark = null } = {}) {
  const title = theirs("span", clip(note.title.trim(), 300) || `(no title) ${note.note_id}`, { class: "title" });
  return make(
    "li",
    { class: "card", "data-note": note.note_id },
    make(
      "a",
      { class: "card-link", href: link("note", { id: note.note_id }), "data-key": `note:${note.note_id}` },
      picture(note),
      mark ? make("span", { class: "mark" }, mark) : null,
      title,
    ),
    ...below,
    // Its focus key is the card's place: when the card is hidden, the next card's button gets the focus.
    hide
      ? button("Hide", hide, {
          class: "hide quiet",
          "data-key": `hide:${mark}`,
          "aria-label": `Hide ${nameOf(note)} from these results`,
        })
      : null,
  );
}

/** Topics as small labels. */
export function topics(note, most = 4) {
  if (!note.topics.length) return null;
  const shown = note.topics.slice(0, most).map((topic) => theirs("li", clip(topic, 60)));
  const more = note.topics.length - shown.length;
  if (more > 0) shown.push(make("li", {}, `+${more}`));
  return make("ul", { class: "topics", "aria-label": "Topics" }, shown);
}

/** A grid of cards; arrow keys, Home and End move between them. Without the role, Safari announces no list. */
export function grid(cards, label) {
  return make("ul", { class: "grid", role: "list", "aria-label": label, on: { keydown: move } }, cards);
}

/** Cards in one line that scrolls horizontally. */
export function strip(notes, label) {
  const items = notes.map((note) => card(note));
  return make("ul", { class: "strip", role: "list", "aria-label": label, on: { keydown: move } }, items);
}

function move(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const links = [...event.currentTarget.querySelectorAll(":scope > li > .card-link")];
  const at = links.indexOf(event.target.closest?.("li")?.querySelector(".card-link"));
  if (at < 0) return;
  const next = {
    ArrowRight: () => links[at + 1],
    ArrowLeft: () => links[at - 1],
    ArrowDown: () => vertical(links, links[at], 1),
    ArrowUp: () => vertical(links, links[at], -1),
    Home: () => links[0],
    End: () => links.at(-1),
  }[event.key]?.();
  if (!next) return;
  event.preventDefault();
  next.focus();
}

// The nearest link in the line below (sign 1) or above (-1); undefined in the last line.
function vertical(links, from, sign) {
  const here = from.getBoundingClientRect();
  const boxes = links.map((link) => ({ link, box: link.getBoundingClientRect() }));
  const beyond = boxes.filter(({ box }) => sign * (box.top - here.top) > 4);
  if (!beyond.length) return undefined;
  const line = Math.min(...beyond.map(({ box }) => sign * box.top));
  const inLine = beyond.filter(({ box }) => sign * box.top < line + 4);
  const distance = ({ box }) => Math.abs(box.left - here.left);
  return inLine.reduce((best, one) => (distance(one) < distance(best) ? one : best)).link;
}
