// Makes elements without parsing HTML: texts become text nodes, whatever they contain.

/**
 * An element.
 * @param {string} tag
 * @param {Object} attributes `on`: {event: listener}; others are set as they are: true as an empty attribute; false,
 *   null and undefined not at all
 * @param {...(Node|string|null|Array)} children strings become text
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Text by users: it has a writing direction of its own, which does not affect the text around it. */
export function theirs(tag, text, attributes = {}) {
  return make(tag, { dir: "auto", ...attributes }, text);
}

/** An input with its label and a hint. */
export function field(label, input, hint = null) {
  const id = input.id || `field-${input.getAttribute("name")}`;
  input.id = id;
  if (hint) input.setAttribute("aria-describedby", `${id}-hint`);
  return make(
    "div",
    { class: "field" },
    make("label", { for: id }, label),
    input,
    hint ? make("p", { class: "hint", id: `${id}-hint` }, hint) : null,
  );
}

/** A button. */
export function button(text, action, attributes = {}) {
  return make("button", { type: "button", ...attributes, on: { click: action } }, text);
}

/** Tell screen readers something that is visible elsewhere. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** The beginning of a text, for labels and titles. */
export function clip(text, most = 80) {
  const characters = Array.from(text.slice(0, 2 * most + 2));
  return characters.length > most ? `${characters.slice(0, most).join("")}…` : text;
}

/** A note's name: its title, or its id if it has none. */
export function nameOf(note) {
  return clip(note.title.trim() || `note ${note.note_id}`);
}

/** "1 note", "3 notes". */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}
