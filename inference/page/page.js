// The chat page: the conversation, its settings, and the buttons.

import { readModel, streamAnswer } from "./api.js";
import { FieldError, NUMBERS, readNumbers } from "./settings.js";
import { TEXTS } from "./texts.js";
import { drawTurn, isBlank, renderEditor, renderTurn, sendByEnter } from "./turns.js";

const KEPT = "chat-page"; // in sessionStorage: of this tab, until it is closed
const byId = (id) => document.getElementById(id);

// turns: {role, content}; an answer also has reasoning, and how it ended (ending, numTokens), once it has.
const state = { turns: [], settings: {}, key: "", language: navigator.language.startsWith("zh") ? "zh" : "en" };
let model = null; // what the server says of it
let running = null; // the AbortController of the answer that comes
let editing = -1; // the number of the turn that is edited
let isKept = true;

const say = (name, ...values) => {
  const text = TEXTS[state.language][name];
  return typeof text === "function" ? text(...values) : text;
};

// ---- what the tab keeps ----

function keep() {
  for (const id of ["system", ...NUMBERS]) state.settings[id] = byId(id).value;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(state));
    isKept = true;
  } catch {
    if (isKept) showNotice(say("notKept"));
    isKept = false;
  }
}

function takeKept() {
  const kept = sessionStorage.getItem(KEPT);
  if (kept) Object.assign(state, JSON.parse(kept));
  for (const [id, value] of Object.entries(state.settings)) byId(id).value = value;
  const last = state.turns.at(-1);
  if (last?.role === "assistant") last.ending ??= "broken"; // the page was left while it came
}

// ---- what is asked ----

function buildRequest() {
  const system = byId("system").value;
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of state.turns) {
    if (isBlank(turn)) continue; // an empty answer: nothing was said
    const message = { role: turn.role, content: turn.content };
    if (turn.reasoning) message.reasoning_content = turn.reasoning;
    messages.push(message);
  }
  return { model: model.name, messages, ...readNumbers(say) };
}

// Answer the last turn, which is the user's.
async function answer() {
  showNotice("");
  let body;
  try {
    if (!model) await connect();
    if (!model) return render();
    body = buildRequest();
  } catch (error) {
    if (!(error instanceof FieldError)) throw error;
    render();
    return showNotice(error.message);
  }
  const turn = { role: "assistant", content: "", reasoning: "" };
  const control = new AbortController();
  state.turns.push(turn);
  running = control;
  render();
  try {
    for await (const piece of streamAnswer(body, state.key, control.signal)) {
      turn.content += piece.content;
      turn.reasoning += piece.reasoning;
      turn.ending = piece.finishReason ?? turn.ending;
      turn.numTokens = piece.numTokens ?? turn.numTokens;
      if (piece.content || piece.reasoning) drawSoon(turn);
    }
  } catch (error) {
    turn.ending = error.name === "AbortError" ? "stopped" : "broken";
    if (turn.ending === "broken") showError(error);
  }
  if (isBlank(turn)) state.turns = state.turns.filter((other) => other !== turn);
  if (isBlank(turn) && !["stopped", "broken"].includes(turn.ending)) showNotice(say("empty"));
  if (running === control) running = null;
  render();
}

function ask(text) {
  if (running || editing >= 0 || !text.trim()) return false;
  state.turns.push({ role: "user", content: text });
  answer();
  return true;
}

function retry() {
  if (state.turns.at(-1).role === "assistant") state.turns.pop();
  answer();
}

function clear() {
  running?.abort();
  running = null;
  state.turns = [];
  editing = -1;
  showNotice("");
  render();
  byId("question").focus();
}

// ---- the server ----

async function connect() {
  try {
    model = await readModel(state.key);
  } catch (error) {
    showError(error);
    return;
  }
  renderTexts();
}

function showError(error) {
  if (error.status === 401) {
    byId("key-error").textContent = state.key ? say("keyWrong") : "";
    byId("key-dialog").showModal();
    byId("key").select();
  } else if (error.status === 0) {
    showNotice(say(running ? "lost" : "unreachable"));
  } else if (error.status) {
    showNotice(error.message);
  } else {
    showNotice(String(error));
    console.error(error);
  }
}

async function useKey() {
  state.key = byId("key").value.trim();
  byId("key-dialog").close();
  await connect();
  keep();
}

// ---- what is shown ----

function showNotice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function renderTexts() {
  document.documentElement.lang = state.language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  byId("language").textContent = say("language");
  byId("question").placeholder = say("question");
  for (const id of NUMBERS) byId(id).placeholder = model?.decoding[id] ?? say("own");
  byId("seed").placeholder = say("random");
  byId("system").placeholder = model?.system_message ?? say("none");
  if (!model) return;
  byId("model").textContent = document.title = model.name;
  const tokens = model.stop_tokens;
  byId("stop-tokens").textContent = tokens.length ? say("stopsAt", tokens.join(" ")) : say("neverStops");
}

function render() {
  const log = byId("conversation");
  log.replaceChildren(...state.turns.map(renderNumbered));
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  byId("question").disabled = editing >= 0;
  log.scrollTop = log.scrollHeight;
  keep();
}

function renderNumbered(turn, number) {
  if (number === editing) return renderEditor(turn, say, (text) => leaveEditor(number, text));
  const isFree = !running && editing < 0;
  const isLast = number === state.turns.length - 1;
  return renderTurn(turn, say, {
    edit: isFree && turn.role === "user" ? () => edit(number) : null,
    retry: isFree && isLast ? retry : null,
  });
}

function edit(number) {
  editing = number;
  render();
  document.querySelector(".editor").focus();
}

// text: what to ask in place of the turn; null: leave it as it was.
function leaveEditor(number, text) {
  editing = -1;
  if (text === null) return render();
  state.turns.length = number; // what followed was said to something else
  ask(text);
}

let isDrawing = false;

// The answer that comes, once a frame, however fast it comes. Who has scrolled up reads on there.
function drawSoon(turn) {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    const log = byId("conversation");
    if (turn !== state.turns.at(-1)) return;
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    drawTurn(turn, say, log.lastElementChild);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  });
}

// ---- the start ----

function sendQuestion() {
  if (ask(byId("question").value)) byId("question").value = "";
}

function listen(id, name, whenCalled) {
  byId(id).addEventListener(name, (event) => {
    if (name === "submit") event.preventDefault();
    whenCalled();
  });
}

listen("ask", "submit", sendQuestion);
listen("settings", "submit", () => {});
listen("settings", "change", keep);
listen("stop", "click", () => running?.abort());
listen("clear", "click", clear);
listen("key-form", "submit", useKey);
listen("language", "click", () => {
  state.language = state.language === "en" ? "zh" : "en";
  renderTexts();
  if (editing < 0) render(); // what is written in the editor stays
});
sendByEnter(byId("question"), sendQuestion);
window.addEventListener("pagehide", keep);

takeKept();
renderTexts();
render();
await connect();
