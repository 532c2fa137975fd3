// The filters of a search: topics, dates, hidden notes, number of results. The address holds all of them.

import { button, clip, count, field, make, theirs } from "./dom.js";
import { go, link } from "./route.js";

const OFFERED = 14;
const COUNTS = [10, 20, 50, 100];
let unfolded = false; // kept from one search to the next

/** The filters in an address, as parameters for links. */
export function chosen(params) {
  return {
    k: params.get("k"),
    topic: params.getAll("topic"),
    all: params.get("all"),
    from: params.get("from"),
    to: params.get("to"),
    not: params.getAll("not"),
  };
}

/** The number of neighbours to ask for. */
export function wanted(params) {
  const k = Number(params.get("k"));
  return Number.isInteger(k) && k > 0 ? k : 20;
}

/** The filter for /v1/similar; undefined for none. */
export function asked(params) {
  const topics = params.getAll("topic");
  const filter = {
    ...(topics.length ? { [params.get("all") ? "topics_all" : "topics_any"]: topics } : {}),
    ...(params.get("from") ? { created_after: moment(params.get("from")) } : {}),
    ...(params.get("to") ? { created_before: moment(params.get("to")) } : {}),
    ...(params.getAll("not").length ? { exclude: params.getAll("not") } : {}),
  };
  return Object.keys(filter).length ? filter : undefined;
}

// The start of a day in UTC; any other value is passed on, and the service refuses it.
function moment(day) {
  return /^\d{4}-\d\d-\d\d$/.test(day) ? `${day}T00:00:00Z` : day;
}

/**
 * The panel with all filters.
 * @param {string} view of the address
 * @param {Object} base the other parameters of the address
 * @param {URLSearchParams} params
 * @param {Array} notes cards whose topics are offered, those of the query first
 */
export function panel(view, base, params, notes) {
  const now = chosen(params);
  const change = (changes) => go(link(view, { ...base, ...now, ...changes }));
  const active = now.topic.length + now.not.length + (now.from ? 1 : 0) + (now.to ? 1 : 0);
  const details = make(
    "details",
    { class: "filters", open: unfolded },
    make("summary", { "data-key": "filters" }, active ? `Filters (${active})` : "Filters"),
    topicFields(now, offered(now.topic, notes), change),
    make(
      "div",
      { class: "row" },
      dateField("Created from", "from", now, change),
      dateField("Created before", "to", now, change),
      countField(params, change),
    ),
    hidden(now, notes, change),
    active ? button("Clear all", () => change({ topic: [], all: null, from: null, to: null, not: [] })) : null,
  );
  details.addEventListener("toggle", () => (unfolded = details.open));
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    details.open = false;
    details.querySelector("summary").focus();
  });
  return details;
}

function offered(picked, notes) {
  const seen = new Map(picked.map((topic) => [topic, Infinity]));
  for (const note of notes) for (const topic of note.topics) seen.set(topic, (seen.get(topic) ?? 0) + 1);
  const byCount = [...seen].sort((a, b) => (a[1] === b[1] ? 0 : b[1] - a[1]));
  return byCount.slice(0, Math.max(OFFERED, picked.length)).map(([topic]) => topic);
}

function topicFields(now, topics, change) {
  const set = new Set(now.topic);
  const toggle = (topic, on) =>
    change({ topic: on ? [...now.topic, topic] : now.topic.filter((one) => one !== topic) });
  const boxes = topics.map((topic) => {
    const attributes = { type: "checkbox", name: "topic", checked: set.has(topic), "data-key": `topic:${topic}` };
    const box = make("input", { ...attributes, on: { change: () => toggle(topic, box.checked) } });
    return make("label", { class: "chip" }, box, theirs("span", clip(topic, 60)));
  });
  const other = make("input", { name: "other", id: "other-topic", autocomplete: "off", "data-key": "other-topic" });
  const add = (event) => {
    event.preventDefault();
    if (other.value.trim() && !set.has(other.value.trim())) toggle(other.value.trim(), true);
  };
  const all = make("input", { type: "checkbox", name: "all", checked: Boolean(now.all), "data-key": "all" });
  all.addEventListener("change", () => change({ all: all.checked ? 1 : null }));
  return make(
    "fieldset",
    {},
    make("legend", {}, "Topics"),
    make("div", { class: "chips" }, boxes),
    make("form", { class: "row", on: { submit: add } }, field("Another topic", other), make("button", {}, "Add")),
    make("label", { class: "check" }, all, "Notes must have all of these topics"),
  );
}

function dateField(label, name, now, change) {
  const input = make("input", { type: "date", name, value: now[name], "data-key": name });
  input.addEventListener("change", () => change({ [name]: input.value || null }));
  return field(label, input);
}

function countField(params, change) {
  const k = wanted(params);
  const values = COUNTS.includes(k) ? COUNTS : [...COUNTS, k].sort((a, b) => a - b);
  const options = values.map((value) => make("option", { value, selected: value === k }, String(value)));
  const select = make("select", { name: "k", "data-key": "k" }, options);
  select.addEventListener("change", () => change({ k: select.value }));
  return field("Neighbours", select);
}

function hidden(now, notes, change) {
  if (!now.not.length) return null;
  const show = (id) => change({ not: now.not.filter((one) => one !== id) });
  const buttons = now.not.map((id) =>
    make(
      "li",
      {},
      button(clip(id, 30), () => show(id), { class: "quiet", "aria-label": `Show ${clip(id)} again` }),
    ),
  );
  const heading = make("p", {}, `${count(now.not.length, "note")} hidden; click one to show it again:`);
  return make("div", {}, heading, make("ul", { class: "chips" }, buttons));
}
