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
    element("span", { className: "kind" }, element("span", { className: `swatch ${colour(strand.kind)}` }), strand.kind),
    `${strand.position}–${strand.position + strand.tokens - 1}`,
    `${strand.offset}`,
    bytes(strand.nbytes),
    percent(strand.weight),
  ]);
  const caption = `${plan}: ${strands.length} ${strands.length === 1 ? "strand" : "strands"}, ${bytes(strands.reduce((sum, strand) => sum + strand.nbytes, 0))}${strands.length > 8 ? "; the 8 with most attention" : ""}`;
  box.replaceChildren(picture, table(caption, [["stored"], ["positions", true], ["frame", true], ["bytes", true], ["attention", true]], rows));
};

export const drawDraft = (box, draft) => {
  const accepted = new Set(draft.accepted);
  const depth = [];
  const children = draft.parents.map(() => []);
  draft.parents.forEach((parent, node) => {
    depth.push(parent < 0 ? 0 : depth[parent] + 1);
    if (parent >= 0) children[parent].push(node);
  });
  // A node lies in the row of its first child, accepted ones first, so that no two edges cross.
  const row = [];
  let rows = 0;
  const place = (node) => {
    row[node] = rows;
    const ordered = [...children[node]].sort((one, other) => accepted.has(other) - accepted.has(one));
    ordered.forEach((child, at) => {
      if (at) rows += 1;
      place(child);
    });
  };
  place(0);
  const width = 84 * (Math.max(...depth) + 1) + 8;
  const height = 30 * (rows + 1) + 8;
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Draft tree: what the sentence above counts" });
  picture.style.width = `${width}px`;
  const at = (node) => [6 + 84 * depth[node], 6 + 30 * row[node]];
  draft.parents.forEach((parent, node) => {
    if (parent < 0) return;
    const [x, y] = at(node);
    const [px, py] = at(parent);
    const path = `M${px + 70} ${py + 11} H${x - 7} V${y + 11} H${x}`;
    picture.append(shape("path", { d: path, class: accepted.has(node) ? "edge accepted" : "edge" }));
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

const hex = (byte) => byte.toString(16).padStart(2, "0");
const byteName = (byte) => {
  if (byte === null) return "end";
  const text = byte > 32 && byte < 127 ? String.fromCharCode(byte) : { 9: "⇥", 10: "↵", 32: "␣" }[byte];
  return text ? `${text} ${hex(byte)}` : hex(byte);
};

export const drawToken = (box, entry) => {
  const rows = entry.top_logprobs.map((other) => [
    element("code", { textContent: visible(shown(other.token, other.bytes)) + (other.token === entry.token ? "  ← chosen" : "") }),
    percent(Math.exp(other.logprob)),
  ]);
  const laws = element("div", { className: "laws" });
  box.replaceChildren(
    element("p", {}, element("code", { textContent: visible(shown(entry.token, entry.bytes)) }), ` ${percent(Math.exp(entry.logprob))}, bytes `, element("code", { textContent: entry.bytes.map(hex).join(" ") })),
    table("Likeliest tokens here", [["token"], ["probability", true]], rows),
    laws,
  );
  return laws;
};

// What else a byte might have been, as far as that would show.
const instead = (step) => {
  const others = step.next.filter((one) => one.byte !== step.byte && one.probability >= 0.0005).slice(0, 3);
  return element("span", {}, ...others.map((one) => element("span", { className: "other" }, element("code", { textContent: byteName(one.byte).split(" ")[0] }), ` ${percent(one.probability)}`)));
};

// The exact law before each byte of a token, whichever tokens would spell it.
export const drawBytes = (box, steps) => {
  const rows = steps.map((step) => [
    element("code", { textContent: byteName(step.byte) }),
    percent(step.probability),
    instead(step),
  ]);
  box.replaceChildren(table("Byte by byte, exact over all tokens", [["byte"], ["probability", true], ["instead"]], rows));
};

const short = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4))));

// A measured value with its spread, and the bar that it must reach; the shaded side is where it holds.
export const drawBar = ({ bar, holds }, quantity) => {
  const [low, high] = quantity.spread ?? [quantity.value, quantity.value];
  const values = [low, high, quantity.value, bar.value];
  const positive = values.filter((value) => value > 0);
  const isLog = positive.length === values.length && Math.max(...values) > 30 * Math.min(...values);
  const of = isLog ? Math.log10 : (value) => value;
  const most = Math.max(...values.map(of), isLog ? -Infinity : 0);
  const least = Math.min(...values.map(of), isLog ? Infinity : 0);
  const margin = 0.1 * (most - least || 1);
  const start = least < 0 || isLog ? least - margin : 0;
  const x = (value) => 4 + (392 * (of(value) - start)) / (most + margin - start);
  const picture = shape("svg", { viewBox: "0 0 400 30", "aria-hidden": "true", class: "plot" });
  const edge = x(bar.value);
  const [from, to] = bar.relation === ">=" ? [edge, 396] : [4, edge];
  picture.append(shape("rect", { x: from, y: 5, width: Math.max(0, to - from), height: 20, class: "allowed" }));
  picture.append(shape("line", { x1: 4, x2: 396, y1: 15, y2: 15, class: "lane" }));
  picture.append(shape("line", { x1: x(low), x2: x(high), y1: 15, y2: 15, class: "spread" }));
  picture.append(shape("line", { x1: edge, x2: edge, y1: 3, y2: 27, class: "limit" }));
  picture.append(shape("circle", { cx: x(quantity.value), cy: 15, r: 5, class: holds ? "point holds" : "point misses" }));
  const unit = quantity.unit ? ` ${quantity.unit}` : "";
  const spread = quantity.spread ? ` (${short(low)} to ${short(high)})` : "";
  const caption = element("figcaption", {}, element("strong", { textContent: `${holds ? "✓" : "✗"} ${bar.quantity.replaceAll("_", " ")} ${short(quantity.value)}${unit}` }), `${spread}; must be ${bar.relation === ">=" ? "at least" : "at most"} ${short(bar.value)}${unit}${isLog ? "; logarithmic" : ""}`);
  return element("figure", { className: "measured" }, caption, picture);
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
