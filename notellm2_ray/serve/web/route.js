// The address after # is the page's whole state: #/note?id=n1&topic=food. What is shown follows from it alone, so that
// back, reload and shared links work; only a chosen picture file cannot be part of a link.

/** {view, params} of an address. */
export function parse(hash) {
  const [path, query = ""] = splitOnce(hash.replace(/^#\/?/, ""), "?");
  return { view: path || "home", params: new URLSearchParams(query) };
}

/** An address. `params`: values, lists of values; empty ones are left out. */
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

/** Go to an address; to the present one: show it anew. */
export function go(address) {
  if (location.hash === address) window.dispatchEvent(new HashChangeEvent("hashchange"));
  else location.hash = address;
}

/** Remember, with the entry that is about to be left, where the reader was. */
export function remember() {
  const place = { scroll: window.scrollY, key: document.activeElement?.dataset?.key ?? null };
  sessionStorage.setItem(`place-${history.state?.entry}`, JSON.stringify(place));
}

/**
 * The place in the entry that was come to, or null if it is new. Entries are numbered by history.state, which the
 * browser keeps with each of them.
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
