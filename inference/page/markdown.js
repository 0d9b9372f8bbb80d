// An answer as DOM nodes: code, bold, headings and lists are set off, and every character of the answer stays.
//
// What the model wrote is what the page shows: marks such as ** and ``` stay, in a lighter colour, and the text of the
// nodes is the answer. Nothing is ever parsed as HTML. Every function is linear in its text: models repeat themselves.

const FENCE = /^ {0,3}(```+|~~~+)/;
const HEADING = /^#{1,6} /;
const ITEM = /^\s*(?:[-*+]|\d{1,9}[.)]) /;

export function renderAnswer(text) {
  const lines = text.match(/[^\n]*\n|[^\n]+/g) ?? [];
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const fence = FENCE.exec(lines[at])?.[1];
    if (fence) {
      const end = findFenceEnd(lines, at, fence);
      nodes.push(renderCode(lines.slice(at, end), fence));
      at = end;
    } else {
      nodes.push(renderLine(lines[at]));
      at += 1;
    }
  }
  return nodes;
}

function isFenceEnd(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && trimmed === fence[0].repeat(trimmed.length);
}

// The line behind a block of code; one that is not closed, as while it streams, goes on to the end.
function findFenceEnd(lines, start, fence) {
  let end = start + 1;
  while (end < lines.length && !isFenceEnd(lines[end], fence)) end += 1;
  return Math.min(end + 1, lines.length);
}

function renderCode(lines, fence) {
  const closed = lines.length > 1 && isFenceEnd(lines.at(-1), fence);
  const block = make("pre", "code");
  block.append(make("span", "mark", lines[0]));
  block.append(make("code", "", lines.slice(1, closed ? -1 : undefined).join("")));
  if (closed) block.append(make("span", "mark", lines.at(-1)));
  return block;
}

function renderLine(line) {
  const heading = HEADING.exec(line)?.[0];
  const item = ITEM.exec(line)?.[0];
  const mark = heading ?? item ?? "";
  const row = make("div", heading ? "heading" : item ? "item" : "line");
  if (mark) row.append(make("span", heading ? "mark" : "bullet", mark));
  const said = make("span");
  renderInline(line.slice(mark.length), said);
  row.append(said);
  return row;
}

// A line's code first: what stands in it is no mark. Then bold, which may hold code.
function renderInline(text, parent) {
  const tokens = readTokens(text);
  for (let at = 0; at < tokens.length; at += 1) {
    const close = tokens[at].kind === "bold" ? findBoldEnd(tokens, at) : -1;
    if (close < 0) {
      appendToken(tokens[at], parent);
      continue;
    }
    const bold = make("strong");
    bold.append(make("span", "mark", "**"));
    for (const token of tokens.slice(at + 1, close)) appendToken(token, bold);
    bold.append(make("span", "mark", "**"));
    parent.append(bold);
    at = close;
  }
}

// Tokens of a line: code (its text without the marks), bold (one mark) and text.
function readTokens(line) {
  const tokens = [];
  const parts = line.split("`"); // odd ones stand between two marks, but for one behind the last mark
  parts.forEach((part, at) => {
    if (at % 2 && at + 1 < parts.length) {
      tokens.push({ kind: part ? "code" : "text", text: part || "``" });
      return;
    }
    const texts = ((at % 2 ? "`" : "") + part).split("**");
    texts.forEach((text, number) => {
      if (number) tokens.push({ kind: "bold", text: "**" });
      if (text) tokens.push({ kind: "text", text });
    });
  });
  return tokens;
}

// Where bold that is opened here is closed; -1: it is no bold.
function findBoldEnd(tokens, open) {
  let close = open + 1;
  while (close < tokens.length && tokens[close].kind !== "bold") close += 1;
  const inside = close < tokens.length && close > open + 1;
  return inside && /^\S/.test(tokens[open + 1].text) && /\S$/.test(tokens[close - 1].text) ? close : -1;
}

function appendToken({ kind, text }, parent) {
  if (kind !== "code") {
    parent.append(text);
    return;
  }
  const code = make("code");
  code.append(make("span", "mark", "`"), text, make("span", "mark", "`"));
  parent.append(code);
}

export function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  return element;
}
