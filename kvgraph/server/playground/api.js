// The server's API: JSON requests, and answers that come as server-sent events.

/** What went wrong, in the server's own words; `status` 0 when there was no answer at all. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const session = {
  get key() { return sessionStorage.getItem("kvgraph-key") ?? ""; },
  set key(value) { sessionStorage.setItem("kvgraph-key", value); },
};

async function send(path, body, signal) {
  const headers = {};
  if (session.key) headers.Authorization = `Bearer ${session.key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method: body === undefined ? "GET" : "POST", headers, signal, body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the server can't be reached");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Failure(told?.error?.message ?? `the server answered ${response.status}`, response.status);
  }
  return response;
}

/** GET, or POST with a body; the JSON of the answer. Throws Failure. */
export async function call(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** POST; the events of the answer as they come. Throws Failure, also for an error in the middle. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  let rest = "";
  for await (const text of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + text).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message);
      yield event;
    }
  }
  throw new Failure("the connection was cut before the answer ended");
}

async function* chunks(readable) { // not every browser can iterate a stream
  const reader = readable.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
