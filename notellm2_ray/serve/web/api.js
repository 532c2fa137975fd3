// Calls to this host's API. Every failure is an ApiError with the service's type and message.

const KEY = "notellm2-key";

/** A failure with a message for the user. */
export class ApiError extends Error {
  /**
   * @param {number} status HTTP status; 0 if there was no answer
   * @param {string} type of the service's error, or "unreachable"
   * @param {string} message
   * @param {string|null} param the field that is wrong
   * @param {number|null} retrySeconds
   */
  constructor(status, type, message, param = null, retrySeconds = null) {
    super(message);
    Object.assign(this, { status, type, param, retrySeconds });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Path of a note's picture. */
export function picturePath(noteId) {
  return `/v1/notes/${encodeURIComponent(noteId)}/image`;
}

/**
 * Send a request.
 * @returns {Promise<Response>} with a status of success
 * @throws {ApiError}; an AbortError if `signal` was aborted
 */
export async function request(method, path, body = undefined, signal = undefined) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The service did not answer.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const after = Number(response.headers.get("retry-after"));
  const retry = after > 0 ? after : null;
  try {
    const { error } = await response.json();
    return new ApiError(response.status, String(error.type), String(error.message), error.param ?? null, retry);
  } catch {
    // The answer is not from the application but from a proxy in front of it.
    const type = response.status === 503 || response.status === 502 ? "unavailable" : "internal";
    return new ApiError(response.status, type, `The service answered HTTP ${response.status} without a reason.`, null, retry);
  }
}

async function json(method, path, body, signal) {
  const response = await request(method, path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(response.status, "internal", "The answer is incomplete, or is not JSON.");
  }
}

const users = "/v1/users";
export const api = {
  note: (id, signal) => json("GET", `/v1/notes/${encodeURIComponent(id)}`, undefined, signal),
  search: (text, limit, signal) => json("POST", "/v1/notes/search", { text, limit }, signal),
  similar: (body, signal) => json("POST", "/v1/similar", body, signal),
  recommend: (body, signal) => json("POST", "/v1/recommend", body, signal),
  users: (limit, signal) => json("GET", `${users}?limit=${limit}`, undefined, signal),
  user: (id, signal) => json("GET", `${users}/${encodeURIComponent(id)}`, undefined, signal),
  upsert: (note, signal) => json("PUT", "/v1/notes", { notes: [note] }, signal),
  remove: (id, signal) => json("POST", "/v1/notes/delete", { note_ids: [id] }, signal),
};

/** A file's bytes in base64. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new ApiError(0, "unreadable", "The file cannot be read."));
    reader.readAsDataURL(file);
  });
}
