// The endpoint that this page came from: requests, its errors as sentences, its streams.

import { byId } from "./page.js";

/** A sentence for the user: what the server or the connection refused. */
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function call(path, options = {}) {
  const key = byId("key").value.trim();
  if (/[^!-~]/.test(key)) throw new Refusal("The API key holds a character that no key has; paste it again.");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = text.trim() || response.statusText || "The server gave no reason.";
  }
  throw new Refusal(message, response.status);
}


/** Data of server-sent events up to `[DONE]`; a stream that ends without it is an error. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Refusal("The connection ended before the answer did.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line.startsWith("[DONE]", 6)) return;
        const data = JSON.parse(line.slice(6));
        if (data.error) throw new Refusal(data.error.message);
        yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
