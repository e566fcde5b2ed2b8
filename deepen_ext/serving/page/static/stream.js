// A stream of server-sent events in OpenAI's form, read chunk by chunk.

class ServerProblem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  const made = { "Content-Type": "application/json" };
  if (key) made.Authorization = `Bearer ${key}`;
  return made;
}

// What to tell the user about an answer that is not 200.
async function problemOf(response) {
  let said = "";
  try {
    const text = await response.text();
    said = text.slice(0, 400);
    const error = JSON.parse(text).error ?? JSON.parse(text).detail;
    said = typeof error === "string" ? error : error?.message ?? said;
  } catch {
    // no JSON: what it says is shown as it is
  }
  const after = /^\d+$/.exec(response.headers.get("Retry-After")); // it may be a date
  const plain = {
    401: "The server asks for a key: fill in the field Key, then start again.",
    403: "The server does not take this key: fill in another one, then start again.",
    429: `The server is busy. Start again ${after ? `in ${after} s` : "a little later"}.`,
    503: `The server takes no requests now. Start again ${after ? `in ${after} s` : "a little later"}.`,
  }[response.status];
  const message = plain ?? `The server could not answer (${response.status}).`;
  return new ServerProblem(response.status, said && response.status !== 401 ? `${message} It says: ${said}` : message);
}

async function readModels(key) {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers(key) });
  } catch {
    throw new ServerProblem(0, "The server cannot be reached. Is deepen-ext serve still running?");
  }
  if (!response.ok) throw await problemOf(response);
  const data = (await response.json().catch(() => null))?.data;
  if (!Array.isArray(data)) throw new ServerProblem(0, "What answers at v1/models is no deepen-ext serve: it lists no models.");
  return data;
}

// The data of each event, as soon as its last line is there.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(() => {
        throw new ServerProblem(0, "The connection was lost. What was written stays.");
      });
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Asks for a text; calls `take(chunk)` for each chunk. Returns when the server says [DONE].
async function streamText(path, body, key, signal, take) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: headers(key), body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerProblem(0, "The server cannot be reached. Is deepen-ext serve still running?");
  }
  if (!response.ok) throw await problemOf(response);
  let done = false; // the rest is read all the same: to leave before would look like a client that has gone
  try {
    for await (const data of eventsOf(response.body)) {
      done ||= data === "[DONE]";
      if (done) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerProblem(500, `The server had to stop: ${chunk.error.message ?? chunk.error}`);
      take(chunk);
    }
  } catch (error) {
    if (done) return;
    if (!(error instanceof SyntaxError)) throw error;
    throw new ServerProblem(0, "The server sent what is no JSON. What was written stays.");
  }
  if (!done) throw new ServerProblem(0, "The connection ended before the text did. What was written stays.");
}
