// Talking to the server: JSON, and streams of server-sent events.

let key = sessionStorage.getItem("plait-key") ?? "";

export const useKey = (given) => {
  key = given;
  sessionStorage.setItem("plait-key", given);
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const ask = async (path, body, method, signal) => {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, told.error?.message ?? `The server answered ${answer.status}.`);
  }
  return answer;
};

export const get = async (path) => (await ask(path, undefined, "GET")).json();
export const post = async (path, body, signal) => (await ask(path, body, "POST", signal)).json();
export const remove = async (path) => (await ask(path, undefined, "DELETE")).json();

// Each event of a stream as it comes; an error inside the stream is thrown.
export async function* stream(path, body, signal) {
  const answer = await ask(path, { ...body, stream: true }, "POST", signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(500, event.error.message);
      yield event;
    }
  }
}
