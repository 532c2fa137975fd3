// What is shown where there is nothing, and where something failed.

import { button, make, theirs } from "./dom.js";

const HEADINGS = {
  unauthorized: "An API key is needed",
  forbidden: "This key may not do that",
  not_found: "Not there",
  invalid_request: "The request was refused",
  malformed_request: "The request was refused",
  too_large: "Too large",
  timeout: "The upload took too long",
  overloaded: "The service is busy",
  unavailable: "The service is not ready",
  unreachable: "The service cannot be reached",
};
const REMEDIES = {
  unauthorized: "Give a key with the scope that this needs; `notellm2 keys create` makes one.",
  forbidden: "Writing and deleting need a key with the scope write.",
  overloaded: "It takes no more requests for the moment.",
  unavailable: "A part of it starts, or is away for the moment.",
  unreachable: "Is it running? An upload far beyond its limits is also cut off without an answer.",
};
const AGAIN = new Set(["overloaded", "unavailable", "unreachable", "timeout", "internal"]);

/**
 * A box that says what failed, and offers what helps.
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

/** A calm word where a list is empty. */
export function empty(text, ...more) {
  return make("div", { class: "empty" }, make("p", {}, text), ...more);
}

/** Grey tiles while the first answer is under way. */
export function skeleton() {
  const tiles = Array.from({ length: 12 }, () =>
    make("li", { class: "card ghost" }, make("span", { class: "picture" })),
  );
  return make("ul", { class: "grid", "aria-hidden": "true" }, tiles);
}
