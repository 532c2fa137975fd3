// Messages for empty lists and failures.

import { button, make, theirs } from "./dom.js";

const HEADINGS = {
  unauthorized: "An API key is needed",
  forbidden: "This key does not allow that",
  not_found: "Not found",
  invalid_request: "The request was refused",
  malformed_request: "The request was refused",
  too_large: "Too large",
  timeout: "The upload took too long",
  overloaded: "The service is busy",
  unavailable: "The service is not ready",
  unreachable: "The service cannot be reached",
};
const REMEDIES = {
  unauthorized: "Enter a key with the scope that is needed; `notellm2 keys create` makes one.",
  forbidden: "Writing and deleting need a key with the scope write.",
  overloaded: "It cannot take more requests at the moment.",
  unavailable: "A part of it is starting, or not available at the moment.",
  unreachable: "Is it running? It also cuts off uploads far beyond its limits without an answer.",
};
const AGAIN = new Set(["overloaded", "unavailable", "unreachable", "timeout", "internal"]);

/**
 * A box that says what failed and what may help.
 * @param {Error} error
 * @param {{again?: Function, giveKey?: Function}} offers
 */
export function problem(error, { again = null, giveKey = null } = {}) {
  const type = error.type ?? "internal";
  const wait = error.retrySeconds ? ` Try again in ${error.retrySeconds} s.` : "";
  const needsKey = type === "unauthorized" || type === "forbidden";
  return make(
    "div",
    { class: "problem", role: "alert", "data-type": type },
    make("h2", {}, HEADINGS[type] ?? "Something failed"),
    theirs("p", error.message),
    make("p", {}, `${REMEDIES[type] ?? ""}${wait}`),
    make(
      "div",
      { class: "row" },
      needsKey && giveKey ? button("Enter a key", giveKey) : null,
      AGAIN.has(type) && again ? button("Try again", again) : null,
    ),
    error.param ? theirs("p", `Field: ${error.param}`, { class: "hint" }) : null,
  );
}

/** A message in place of an empty list. */
export function empty(text, ...more) {
  return make("div", { class: "empty" }, make("p", {}, text), ...more);
}

/** Grey tiles while the page waits for the first answer. */
export function skeleton() {
  const tiles = Array.from({ length: 12 }, () =>
    make("li", { class: "card ghost" }, make("span", { class: "picture" })),
  );
  return make("ul", { class: "grid", "aria-hidden": "true" }, tiles);
}
