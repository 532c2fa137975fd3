// Pictures of notes. They are fetched by script, because <img src> cannot send an API key, and only when they come near
// the visible part of the page.

import { picturePath, request } from "./api.js";
import { button, field, make, nameOf } from "./dom.js";

const MOST = 400; // pictures kept; the oldest is dropped first
const kept = new Map(); // note id -> promise of a blob: URL

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      load(entry.target);
    }
  },
  { rootMargin: "300px" },
);

/** A note's picture in a frame, or a frame that says there is none. `note`: a card. */
export function picture(note) {
  if (!note.has_image) return make("span", { class: "picture none" }, "no picture");
  const image = make("img", { alt: `Picture of ${nameOf(note)}`, "data-note": note.note_id, class: "waiting" });
  watcher.observe(image);
  return make("span", { class: "picture" }, image);
}

/** Promise of a blob: URL of a note's picture. */
export function pictureUrl(noteId) {
  let url = kept.get(noteId);
  if (!url) {
    url = request("GET", picturePath(noteId))
      .then((response) => response.blob())
      .then((blob) => URL.createObjectURL(blob));
    kept.set(noteId, url);
    url.catch(() => kept.delete(noteId));
    if (kept.size > MOST) forgetPicture(kept.keys().next().value);
  }
  return url;
}

/** Drop a note's picture after the note was written or deleted. */
export function forgetPicture(noteId) {
  const url = kept.get(noteId);
  kept.delete(noteId);
  // Revoked later, because an image may still be loading from it.
  url?.then((known) => setTimeout(() => URL.revokeObjectURL(known), 10_000)).catch(() => {});
}

/**
 * A field for a picture, with a preview; a picture can also be pasted.
 * @returns {{node: Node, chosen: function(): File|null, pasted: function(ClipboardEvent)}}
 */
export function pictureInput(before = null) {
  let image = before;
  const preview = make("span", { class: "preview" });
  const input = make("input", { type: "file", name: "image", accept: "image/*", "data-key": "image" });
  const show = () => {
    preview.replaceChildren();
    if (!image) return;
    const shown = make("img", { alt: "Preview of the chosen picture" });
    shown.src = URL.createObjectURL(image);
    shown.onload = shown.onerror = () => URL.revokeObjectURL(shown.src);
    preview.append(
      shown,
      button("Remove", () => choose(null), { class: "quiet" }),
    );
  };
  const choose = (file) => {
    image = file;
    if (!file) input.value = "";
    show();
  };
  input.addEventListener("change", () => choose(input.files[0] ?? null));
  const pasted = (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) choose(file);
  };
  show();
  const node = make(
    "div",
    { class: "picture-field" },
    field("Picture", input, "A file, or a picture pasted into this form."),
    preview,
  );
  return { node, chosen: () => image, pasted };
}

async function load(image) {
  try {
    image.src = await pictureUrl(image.dataset.note);
    await image.decode();
    image.classList.remove("waiting");
  } catch {
    const frame = image.parentElement;
    frame?.classList.add("none");
    frame?.replaceChildren("picture cannot be shown");
  }
}
