// The page: tabs, forms, and what they ask of the server.

import { Refused, get, post, remove, stream, useKey } from "./api.js";
import { bytes, drawBar, drawBytes, drawDraft, drawEdit, drawStrands, drawToken, element, percent, shown } from "./draw.js";

const $ = (id) => document.getElementById(id);
let status = null;
let running = null;
const messages = [];

const say = (error) => {
  if (error.name === "AbortError") return;
  if (error instanceof Refused && error.status === 401) $("key-form").hidden = false;
  $("notice").textContent = error.message;
};

// ---- meters

const showStatus = async () => {
  status = await get("/v1/status");
  const { engine } = status;
  $("model").textContent = `${status.model} · memory ${status.memory} · draft ${status.draft}`;
  $("meter-memory").textContent = bytes(engine.memory_bytes + status.session_bytes);
  $("meter-process").textContent = bytes(status.process_bytes);
  $("meter-shared").textContent = engine.tokens ? percent(engine.shared_tokens / engine.tokens) : "–";
  $("meter-accepted").textContent = engine.proposed ? percent(engine.accepted / engine.proposed) : "–";
};

const poll = async () => {
  if (!document.hidden && $("key-form").hidden) await showStatus().catch(say);
  setTimeout(poll, 2000);
};

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key-form").hidden = true;
  $("notice").textContent = "";
  showStatus().catch(say);
});

// ---- tabs

const tabs = [...document.querySelectorAll("[role=tab]")];
const choose = (tab) => {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  $("notice").textContent = "";
  const isLedger = tab.id === "tab-claims";
  $("happened").hidden = isLedger;
  $("columns").classList.toggle("wide", isLedger);
  if (isLedger) showClaims().catch(say);
};
tabs.forEach((tab, at) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(at + step + tabs.length) % tabs.length];
    next.focus();
    choose(next);
  });
});

// ---- tokens of an answer

// What the step did that made a token.
const drawTrace = (trace) => {
  drawStrands($("strands"), trace.strands, status.memory);
  if (trace.draft.tokens.length > 1) drawDraft($("draft"), trace.draft);
};

// Ask for the law of each byte of a token, once somebody rests on it. `before` brings what the model had read.
let resting = 0;
const askBytes = (box, before, entries, at) => {
  clearTimeout(resting);
  const then = entries[at].bytes;
  if (!before || !then.length || then.length > 64 || entries[at].isSpecial) return;
  box.textContent = "Byte by byte …";
  resting = setTimeout(async () => {
    try {
      const { tokens, text } = await before();
      const prompt = [...new TextEncoder().encode(text), ...entries.slice(0, at).flatMap((entry) => entry.bytes)];
      const { steps } = await post("/v1/bytes", { prompt, before: tokens, then, top: 4 });
      drawBytes(box, steps);
    } catch (error) {
      box.textContent = `No bytes: ${error.message}`;
    }
  }, 250);
};

const newAnswer = (log, who, before) => {
  const text = element("span", { className: "answer", tabIndex: 0 });
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${who}: arrow keys move from token to token`);
  log.append(element("p", { className: "turn" }, element("span", { className: "who", textContent: who }), text));
  const entries = [];
  let at = -1;
  const point = (index) => {
    for (const other of document.querySelectorAll(".answer .chosen")) other.classList.remove("chosen");
    at = Math.max(0, Math.min(index, entries.length - 1));
    if (!entries[at]) return;
    text.children[at].classList.add("chosen");
    if (entries[at].trace) drawTrace(entries[at].trace);
    askBytes(drawToken($("token"), entries[at]), before, entries, at);
  };
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    point(at + step);
  });
  text.addEventListener("pointerover", (event) => {
    const index = [...text.children].indexOf(event.target);
    if (index >= 0) point(index);
  });
  text.addEventListener("pointerdown", (event) => {
    const index = [...text.children].indexOf(event.target);
    if (index >= 0) point(index);
  });
  return {
    add: (entry) => {
      entries.push(entry);
      const piece = shown(entry.token, entry.bytes);
      const span = element("span", { textContent: piece, className: piece === entry.token ? "" : "raw" });
      const chance = Math.exp(entry.logprob);
      if (chance < 0.5) span.dataset.low = chance < 0.1 ? "2" : "1";
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      text.append(span);
      if (follows) log.scrollTop = log.scrollHeight;
    },
  };
};

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const options = () => ({
  temperature: number("temperature") ?? 0,
  max_tokens: number("max-tokens") ?? 200,
  seed: number("seed"),
  trace: status?.trace || undefined,
});

// The log-probabilities of a completion, as chat answers have them.
const asEntries = (logprobs) =>
  logprobs.tokens.map((token, at) => ({
    token,
    bytes: logprobs.bytes[at],
    logprob: logprobs.token_logprobs[at],
    top_logprobs: Object.entries(logprobs.top_logprobs[at]).map(([other, logprob]) => ({ token: other, bytes: [...new TextEncoder().encode(other)], logprob })),
  }));

// Give each chunk of a stream to `take`; the form's Stop button ends it.
const follow = async (form, path, body, take) => {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const stop = form.querySelector(".stop");
  const send = form.querySelector("button:not([type])");
  stop.disabled = false;
  send.disabled = true;
  $("notice").textContent = "";
  try {
    for await (const chunk of stream(path, body, signal)) take(chunk);
  } catch (error) {
    // What was said before a stop stays.
    if (error.name !== "AbortError") throw error;
  } finally {
    // A button that has the focus hands it on before it is disabled.
    if (document.activeElement === stop) {
      send.disabled = false;
      send.focus();
    }
    stop.disabled = true;
    send.disabled = false;
  }
};

// Run one stream: draw what it tells, and return the text.
const run = async (form, path, body, answer) => {
  let said = "";
  let count = 0;
  let first = 0;
  const begun = performance.now();
  await follow(form, path, body, (chunk) => {
    const [choice] = chunk.choices;
    if (!choice) return;
    said += choice.text ?? choice.delta.content ?? "";
    const { logprobs } = choice;
    const entries = !logprobs ? [] : (logprobs.content ?? asEntries(logprobs));
    const isEnd = choice.finish_reason === "stop";
    entries.forEach((entry, at) => {
      if (!(isEnd && at === entries.length - 1 && entry.token.startsWith("<"))) answer.add({ ...entry, trace: chunk.trace });
    });
    if (entries.length) {
      const now = performance.now();
      first ||= now;
      count += entries.length;
      $("meter-first").textContent = `${Math.round(first - begun)} ms`;
      if (count > 1 && now > first) $("meter-speed").textContent = `${((1000 * (count - 1)) / (now - first)).toFixed(1)} tok/s`;
    }
    if (chunk.trace) drawTrace(chunk.trace);
  });
  return said;
};

for (const stop of document.querySelectorAll(".stop")) stop.addEventListener("click", () => running?.abort());

// ---- chat

$("chat-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("chat-text").value.trim();
  if (!text) return;
  const log = $("chat-log");
  messages.push({ role: "user", content: text });
  log.append(element("p", { className: "turn" }, element("span", { className: "who", textContent: "you" }), text));
  $("chat-text").value = "";
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const asked = [...system, ...messages];
  let read = null;
  const answer = newAnswer(log, status?.model ?? "model", async () => {
    read ??= (await post("/tokenize", { messages: asked })).tokens;
    return { tokens: read, text: "" };
  });
  log.scrollTop = log.scrollHeight;
  const body = { model: status?.model ?? "", messages: asked, logprobs: true, top_logprobs: 5, ...options() };
  try {
    const said = await run(event.target, "/v1/chat/completions", body, answer);
    if (said) messages.push({ role: "assistant", content: said });
    else messages.pop();
  } catch (error) {
    messages.pop();
    say(error);
  }
});
$("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!$("chat-send").disabled) $("chat-form").requestSubmit();
  }
});
$("chat-clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("chat-log").replaceChildren();
});

// ---- completion

$("complete-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("complete-log").replaceChildren();
  const text = $("complete-text").value;
  const answer = newAnswer($("complete-log"), status?.model ?? "model", () => ({ text }));
  const body = { model: status?.model ?? "", prompt: text, logprobs: 5, ...options() };
  await run(event.target, "/v1/completions", body, answer).catch(say);
});

// ---- drafts

// A card for a draft; it may be taken over into the text.
const newDraft = (prompt) => {
  const text = element("div", { className: "draft" }, "…");
  const note = element("small", {});
  const use = element("button", { type: "button", textContent: "Use" });
  use.addEventListener("click", () => {
    $("drafts-text").value = prompt + text.textContent.slice(1);
    $("drafts-text").focus();
  });
  $("drafts-list").append(element("li", {}, text, element("p", { className: "buttons" }, note, use)));
  return { text, note };
};

const nats = (sum) => `${sum.toFixed(1)} nats`;

$("drafts-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("notice").textContent = "";
  const prompt = $("drafts-text").value;
  const count = number("drafts-count") ?? 4;
  $("drafts-list").replaceChildren();
  try {
    if ($("drafts-how").value === "superposed") {
      const { data } = await post("/v1/drafts", { prompt, num_drafts: count, max_tokens: 12 });
      for (const draft of data) {
        const card = newDraft(prompt);
        card.text.append(draft.text);
        card.note.textContent = nats(draft.logprob);
      }
      return;
    }
    const cards = Array.from({ length: count }, () => ({ ...newDraft(prompt), sum: 0 }));
    const temperature = Math.max(number("temperature") ?? 0, 0.8);
    const body = { model: status?.model ?? "", prompt, n: count, temperature, seed: number("seed"), max_tokens: 24, logprobs: 0 };
    await follow(event.target, "/v1/completions", body, ({ choices }) => {
      for (const choice of choices) {
        const card = cards[choice.index];
        card.text.append(choice.text);
        card.sum += choice.logprobs.token_logprobs.reduce((sum, one) => sum + one, 0);
        card.note.textContent = nats(card.sum);
      }
    });
  } catch (error) {
    say(error);
  }
});

// ---- editing

let session = null;

$("edit-text").value = [
  "# orders.py: what a shop remembers of its orders",
  "",
  "def total(orders):",
  '    """The sum of the prices of all orders, in cents."""',
  "    return sum(order.price for order in orders)",
  "",
  "def largest(orders):",
  '    """The order with the highest price."""',
  "    return max(orders, key=lambda order: order.price)",
  "",
  "def mean(orders):",
  '    """The mean price of all orders, in cents."""',
  "    return",
].join("\n");

// The span of characters (code points) in which two texts differ.
const difference = (before, after) => {
  const old = [...before];
  const now = [...after];
  let start = 0;
  while (start < old.length && start < now.length && old[start] === now[start]) start += 1;
  let end = old.length;
  let stop = now.length;
  while (end > start && stop > start && old[end - 1] === now[stop - 1]) [end, stop] = [end - 1, stop - 1];
  return { start, end, text: now.slice(start, stop).join("") };
};

const readSession = async (text) => {
  if (session) await remove(`/v1/sessions/${session.id}`).catch(() => {});
  const made = await post("/v1/sessions", { text });
  session = { id: made.id, text, tokens: made.tokens };
  drawEdit($("edit-report"), { encoded: made.tokens, moved: 0, reused: 0 }, `All ${made.tokens} tokens are read.`);
};

const editSession = async (text) => {
  const change = difference(session.text, text);
  if (change.start === change.end && !change.text) {
    drawEdit($("edit-report"), { encoded: 0, moved: 0, reused: session.tokens }, "Nothing changed, nothing is read.");
    return;
  }
  const made = await post(`/v1/sessions/${session.id}/edit`, change);
  session = { ...session, text, tokens: made.tokens };
  const saved = 1 - made.edit.encoded / made.tokens;
  drawEdit($("edit-report"), made.edit, `Of ${made.tokens} tokens ${made.edit.encoded} are read: ${percent(saved)} of the reading is saved.`);
};

$("edit-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("edit-text").value;
  const form = event.target;
  $("notice").textContent = "";
  try {
    if (!session) await readSession(text);
    else {
      try {
        await editSession(text);
      } catch (error) {
        await readSession(text);
        $("edit-report").append(element("p", { textContent: `It could not be edited in place: ${error.message}` }));
      }
    }
    $("edit-log").replaceChildren();
    const answer = newAnswer($("edit-log"), "continuation", () => ({ text }));
    const body = { ...options(), max_tokens: Math.min(number("max-tokens") ?? 40, 40), logprobs: 5 };
    try {
      await run(form, `/v1/sessions/${session.id}/generate`, body, answer);
    } finally {
      // What was said is not part of the text. A stop takes a moment to reach the engine.
      for (let tries = 0; tries < 20; tries += 1) {
        try {
          await post(`/v1/sessions/${session.id}/rewind`, { length: session.tokens });
          break;
        } catch (error) {
          if (error.status !== 409) throw error;
          await new Promise((resolve) => setTimeout(resolve, 100));
        }
      }
    }
  } catch (error) {
    say(error);
  }
});

// ---- claims

const showClaims = async () => {
  const { data } = await get("/v1/claims");
  // What was measured comes first.
  data.sort((one, other) => Boolean(other.result) - Boolean(one.result));
  $("claims-list").replaceChildren(
    ...data.map((row) => {
      const found = row.result?.quantities ?? {};
      const told = element("article", { className: "claim" });
      told.append(
        element("h2", { textContent: row.title }),
        element("p", {}, element("span", { className: `state ${row.state.replaceAll(" ", "-")}`, textContent: row.state }), element("code", { textContent: row.claim })),
        element("p", { textContent: row.headline }),
      );
      const judged = (row.result?.judgements ?? []).filter(({ bar }) => found[bar.quantity]);
      if (row.result?.error) told.append(element("p", { textContent: row.result.error }));
      told.append(...judged.map((judgement) => drawBar(judgement, found[judgement.bar.quantity])));
      return told;
    }),
  );
};

poll();
