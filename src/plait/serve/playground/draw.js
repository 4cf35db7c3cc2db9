// Pictures of what a step did. Text is always set as text, never as markup.

export const element = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
};

const shape = (name, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

export const bytes = (count) => {
  if (count < 1e3) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(1)} kB`;
  if (count < 1e9) return `${(count / 1e6).toFixed(1)} MB`;
  return `${(count / 1e9).toFixed(2)} GB`;
};

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

// What a token looks like; bytes that are no character of their own are shown in hex.
export const shown = (token, raw) => {
  if (!token.includes("\ufffd") || !raw) return token;
  return `⟨${raw.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩`;
};

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

const table = (caption, heads, rows) => {
  const head = element("tr", {}, ...heads.map(([text, number]) => element("th", { textContent: text, scope: "col", className: number ? "number" : "" })));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, at) => element("td", { className: heads[at][1] ? "number" : "" }, cell))));
  return element("table", {}, element("caption", { textContent: caption }), element("thead", {}, head), element("tbody", {}, ...body));
};

const kinds = new Map();
const colour = (kind) => {
  if (!kinds.has(kind)) kinds.set(kind, `k${kinds.size % 5}`);
  return kinds.get(kind);
};

export const drawStrands = (box, strands, plan) => {
  const end = Math.max(1, ...strands.map((strand) => strand.position + strand.tokens));
  const x = (position) => 4 + (392 * position) / end;
  const picture = shape("svg", { viewBox: "0 0 400 92", "aria-hidden": "true" });
  picture.append(shape("rect", { x: 4, y: 4, width: 392, height: 56, class: "lane" }));
  for (const strand of strands) {
    const width = Math.max(2, x(strand.position + strand.tokens) - x(strand.position) - 1);
    const height = 54 * Math.min(1, strand.weight);
    picture.append(shape("rect", { x: x(strand.position), y: 59 - height, width, height, class: colour(strand.kind) }));
    picture.append(shape("rect", { x: x(strand.position), y: 64, width, height: 10, rx: 2, class: colour(strand.kind) }));
  }
  picture.append(shape("text", { x: 4, y: 88 }, "0"), shape("text", { x: 396, y: 88, "text-anchor": "end" }, `position ${end}`));
  const most = [...strands].sort((a, b) => b.weight - a.weight).slice(0, 8).sort((a, b) => a.position - b.position);
  const rows = most.map((strand) => [
    element("span", {}, element("span", { className: `swatch ${colour(strand.kind)}` }), strand.kind),
    `${strand.position}–${strand.position + strand.tokens - 1}`,
    `${strand.offset}`,
    bytes(strand.nbytes),
    percent(strand.weight),
  ]);
  const caption = `${plan}: ${strands.length} ${strands.length === 1 ? "strand" : "strands"}, ${bytes(strands.reduce((sum, strand) => sum + strand.nbytes, 0))}${strands.length > 8 ? "; the 8 with most attention" : ""}`;
  box.replaceChildren(picture, table(caption, [["stored as"], ["positions", true], ["frame", true], ["bytes", true], ["attention", true]], rows));
};

export const drawDraft = (box, draft) => {
  const accepted = new Set(draft.accepted);
  const depth = [];
  draft.parents.forEach((parent, node) => depth.push(parent < 0 ? 0 : depth[parent] + 1));
  const used = [];
  const row = draft.parents.map((parent, node) => {
    const at = depth[node];
    used[at] = Math.max(used[at] ?? 0, parent < 0 ? 0 : 0);
    return used[at]++;
  });
  const width = 84 * (Math.max(...depth) + 1) + 8;
  const height = 30 * Math.max(...used) + 8;
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Draft tree; the table below says the same" });
  picture.style.width = `${width}px`;
  const at = (node) => [6 + 84 * depth[node], 6 + 30 * row[node]];
  draft.parents.forEach((parent, node) => {
    if (parent < 0) return;
    const [x, y] = at(node);
    const [px, py] = at(parent);
    picture.append(shape("line", { x1: px + 70, y1: py + 11, x2: x, y2: y + 11, class: accepted.has(node) ? "edge accepted" : "edge" }));
  });
  draft.tokens.forEach((token, node) => {
    const [x, y] = at(node);
    picture.append(shape("rect", { x, y, width: 70, height: 22, rx: 5, class: accepted.has(node) ? "node accepted" : "node" }));
    const text = visible(token);
    picture.append(shape("text", { x: x + 6, y: y + 15 }, `${accepted.has(node) ? "✓" : "✗"} ${text.length > 6 ? `${text.slice(0, 5)}…` : text}`));
  });
  const guessed = draft.tokens.length - 1;
  const said = `${accepted.size - 1} of ${guessed} ${guessed === 1 ? "guess" : "guesses"} accepted in one step, behind “${visible(draft.tokens[0])}”.`;
  const scroller = element("div", {}, picture);
  box.replaceChildren(element("p", { textContent: said }), scroller);
};

export const drawToken = (box, entry) => {
  const hex = entry.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const rows = entry.top_logprobs.map((other) => [
    element("code", { textContent: visible(shown(other.token, other.bytes)) + (other.token === entry.token ? "  ← chosen" : "") }),
    percent(Math.exp(other.logprob)),
  ]);
  box.replaceChildren(
    element("p", {}, element("code", { textContent: visible(shown(entry.token, entry.bytes)) }), ` ${percent(Math.exp(entry.logprob))}, bytes `, element("code", { textContent: hex })),
    table("Likeliest tokens here", [["token"], ["probability", true]], rows),
  );
};

export const drawEdit = (box, report, text) => {
  const total = Math.max(1, report.encoded + report.moved + report.reused);
  const parts = [["read", report.encoded, "k1"], ["moved", report.moved, "k3"], ["kept in place", report.reused, "k2"]];
  const bar = element("div", { className: "bar", ariaHidden: "true" });
  for (const [, count, kind] of parts) {
    const part = element("div", { className: kind });
    part.style.width = `${(100 * count) / total}%`;
    bar.append(part);
  }
  const legend = element("p", {});
  for (const [name, count, kind] of parts) legend.append(element("span", { className: `swatch ${kind}` }), `${count} ${name}  `);
  box.replaceChildren(element("p", { textContent: text }), bar, legend);
};
