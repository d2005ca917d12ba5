// The server: requests as JSON, and the events of a job as a stream that goes on after a lost connection where it was.
// A server with a key asks for it with basic authentication, which the browser then adds to every request by itself.

import { t } from "./i18n.js";

/** The server refused (`status`), or could not be reached (`status` 0). The message is for people. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer's JSON; null for one without content. Seeds of more than 53 bits stay strings. */
export async function request(method, path, body) {
  const response = await send(method, path, body === undefined ? undefined : toJson(body));
  const text = await response.text();
  return text ? fromJson(text) : null;
}

async function send(method, path, body, headers = {}, signal = undefined) {
  const all = body === undefined ? headers : { ...headers, "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { method, headers: all, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, t("error.unreachable"));
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The events of a job from `last` on: {id, name, data}. Ends when the server ends the stream. */
export async function* events(path, last, signal) {
  const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
  const response = await send("GET", path, undefined, headers, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, t("error.unreachable"));
    });
    if (done) return;
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = parsed(block);
      if (event) yield event;
    }
  }
}

function parsed(block) {
  const event = { id: "", name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = line.match(/^(\w+): ?(.*)$/) ?? [];
    if (field === "id") event.id = value;
    if (field === "event") event.name = value;
    if (field === "data") event.data += value;
  }
  return event.data ? { ...event, data: fromJson(event.data) } : null;
}

// A quote inside a JSON string is escaped, so neither pattern can match in a prompt.
const fromJson = (text) => JSON.parse(text.replace(/("(?:variation_)?seed"\s*:\s*)(\d{16,})/g, '$1"$2"'));
const toJson = (body) => JSON.stringify(body).replace(/("(?:variation_)?seed":)"(\d+)"/g, "$1$2");

async function refusal(response) {
  const body = await response.json().catch(() => null); // a proxy's error page, say
  return new ServerError(response.status, body?.detail ?? t("error.status", { status: response.status }));
}
