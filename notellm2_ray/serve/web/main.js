// Shows the view that the address names; also handles the search box, the API key, focus and scrolling.

import { key } from "./api.js";
import { announce, make } from "./dom.js";
import { home, note, paste, search } from "./note.js";
import { empty, problem, skeleton } from "./problems.js";
import { go, link, parse, recall, remember } from "./route.js";
import { user, users } from "./user.js";
import { write } from "./write.js";

// Each: async (params, signal) => {title, said, nodes}; `said` is for screen readers.
const VIEWS = { home, search, note, paste, users, user, write };
const TABS = { user: "users" };
const main = document.getElementById("main");
const query = document.getElementById("query");
let running = new AbortController();

async function show({ first = false } = {}) {
  const place = recall();
  const held = document.activeElement?.dataset?.key ?? null;
  const { view, params } = parse(location.hash);
  running.abort();
  running = new AbortController();
  const { signal } = running;
  busy(true);
  if (!main.querySelector("h1")) main.replaceChildren(skeleton());
  markTab(view);
  if (view === "search") query.value = params.get("q") ?? "";
  const made = await load(view, params, signal);
  if (signal.aborted) return;
  busy(false);
  main.replaceChildren(...made.nodes);
  document.title = `${made.title} · notellm2`;
  announce(made.said ?? "");
  settle(place, held, first);
}

async function load(view, params, signal) {
  try {
    if (!VIEWS[view])
      return {
        title: "Not found",
        nodes: [make("h1", { tabindex: "-1" }, "Not found"), empty("There is no such view.")],
      };
    return await VIEWS[view](params, signal);
  } catch (error) {
    if (error.name !== "AbortError" && !error.type) console.error(error);
    const heading = make("h1", { tabindex: "-1", class: "unseen" }, "This did not work");
    return { title: "Problem", nodes: [heading, problem(error, { again: () => show(), giveKey: openKey })] };
  }
}

// Focus and scroll position: restored after going back; otherwise the control that was used, or the new heading.
function settle(place, held, first) {
  const wantedKey = place?.key ?? held;
  const same = wantedKey ? [...main.querySelectorAll("[data-key]")].find((one) => one.dataset.key === wantedKey) : null;
  if (!first) (same ?? main.querySelector("h1") ?? main).focus({ preventScroll: true });
  if (place) window.scrollTo(0, place.scroll);
  else if (!first && !same) window.scrollTo(0, 0);
}

function busy(on) {
  main.setAttribute("aria-busy", String(on));
  document.getElementById("progress").hidden = !on;
}

function markTab(view) {
  for (const tab of document.querySelectorAll("nav [data-view]")) {
    if (tab.dataset.view === (TABS[view] ?? view)) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

const keyDialog = document.getElementById("key-dialog");
const keyInput = document.getElementById("key");

function openKey() {
  keyInput.value = key.get();
  document.getElementById("key-problem").textContent = "";
  keyDialog.showModal();
}

function useKey(event) {
  event.preventDefault();
  const value = keyInput.value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) {
    document.getElementById("key-problem").textContent = "A key consists of plain letters, digits and signs, without spaces.";
    keyInput.focus();
    return;
  }
  key.set(value);
  closeKey();
}

function closeKey() {
  keyDialog.close();
  markKey();
  // Showing a form again would lose what was typed. Without a form (the note could not be read) nothing is lost.
  const typing = parse(location.hash).view === "write" && main.querySelector("form");
  if (!typing) show();
}

function markKey() {
  const shown = document.getElementById("key-button");
  shown.textContent = key.get() ? "Key ✓" : "Key";
  shown.setAttribute("aria-label", key.get() ? "API key, given" : "API key, none");
}

document.getElementById("key-button").addEventListener("click", openKey);
document.getElementById("key-form").addEventListener("submit", useKey);
document.getElementById("key-close").addEventListener("click", () => keyDialog.close());
document.getElementById("key-forget").addEventListener("click", () => {
  key.forget();
  closeKey();
});
const pictureDialog = document.getElementById("picture-dialog");
document.getElementById("picture-close").addEventListener("click", () => pictureDialog.close());
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  go(link("search", { q: query.value.trim() }));
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address must not change: it names the view
  (main.querySelector("h1") ?? main).focus();
});
// Capture phase: before the page changes.
document.addEventListener("click", remember, true);
document.addEventListener("submit", remember, true);
document.addEventListener("change", remember, true);
window.addEventListener("hashchange", () => show());
history.scrollRestoration = "manual";
markKey();
show({ first: true });
