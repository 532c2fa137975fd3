// The part of the address after # is the page's whole state: #/note?id=n1&topic=food. It alone decides what is shown,
// so that the back button, reloading and shared links work. Only a chosen picture file cannot be part of it.

/** The view and the parameters of an address. */
export function parse(hash) {
  const [path, query = ""] = splitOnce(hash.replace(/^#\/?/, ""), "?");
  return { view: path || "home", params: new URLSearchParams(query) };
}

/** An address. `params`: values or lists of values; empty ones are left out. */
export function link(view, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "" && one !== false) query.append(name, String(one));
    }
  }
  const text = query.toString();
  return `#/${view === "home" ? "" : view}${text ? `?${text}` : ""}`;
}

/** Go to an address; if it is the present one, show it again. */
export function go(address) {
  if (location.hash === address) window.dispatchEvent(new HashChangeEvent("hashchange"));
  else location.hash = address;
}

/** Store the scroll position and focus of the history entry that is about to be left. */
export function remember() {
  const place = { scroll: window.scrollY, key: document.activeElement?.dataset?.key ?? null };
  sessionStorage.setItem(`place-${history.state?.entry}`, JSON.stringify(place));
}

/**
 * The stored position in the current history entry, or null if it is new. Entries are numbered in history.state, which
 * the browser keeps for each of them.
 */
export function recall() {
  const entry = history.state?.entry;
  if (entry === undefined) {
    const next = Number(sessionStorage.getItem("entries") ?? 0) + 1;
    sessionStorage.setItem("entries", String(next));
    history.replaceState({ entry: next }, "");
    return null;
  }
  return JSON.parse(sessionStorage.getItem(`place-${entry}`) ?? "null");
}

function splitOnce(text, separator) {
  const at = text.indexOf(separator);
  return at < 0 ? [text] : [text.slice(0, at), text.slice(at + 1)];
}
