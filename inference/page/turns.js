// One turn of the conversation as elements. say: (name, ...values) => the interface's text.

import { make, renderAnswer } from "./markdown.js";

export const isBlank = (turn) => !turn.content.trim() && !turn.reasoning?.trim();

// actions: {edit, retry}: what these buttons do; null: no button.
export function renderTurn(turn, say, actions) {
  const element = make("article", turn.role);
  element.append(make("h2", "", say(turn.role)));
  drawTurn(turn, say, element);
  const foot = make("footer");
  if (turn.ending) foot.append(make("span", "ending", describeEnding(turn, say)));
  for (const [name, act] of Object.entries(actions)) if (act) foot.append(makeButton(name, say, act));
  element.append(foot);
  return element;
}

function describeEnding({ ending, numTokens }, say) {
  const name = { stop: "ended", length: "cut" }[ending] ?? ending;
  return say(name, numTokens);
}

// What a turn says, into its element, in place of what stood there.
export function drawTurn(turn, say, element) {
  const isOpen = element.querySelector(".thought")?.open ?? true;
  element.querySelectorAll(":scope > .said, :scope > .thought, :scope > .waiting").forEach((part) => part.remove());
  const said = make("div", "said");
  if (turn.role === "user") said.textContent = turn.content;
  else said.append(...renderAnswer(turn.content));
  const parts = [said];
  if (turn.reasoning) {
    const thought = make("details", "thought");
    thought.open = isOpen;
    thought.append(make("summary", "", say("reasoning")), make("div", "text", turn.reasoning));
    parts.unshift(thought);
  } else if (isBlank(turn)) {
    parts.push(make("div", "waiting", say("waiting")));
  }
  element.querySelector("h2").after(...parts);
}

// leave: called with the text to ask in its place, or null.
export function renderEditor(turn, say, leave) {
  const element = make("article", turn.role);
  const area = make("textarea", "editor");
  area.value = turn.content;
  area.rows = Math.min(turn.content.split("\n").length + 1, 12);
  const save = () => area.value.trim() && leave(area.value);
  sendByEnter(area, save);
  const foot = make("footer");
  foot.append(
    makeButton("save", say, save),
    makeButton("cancel", say, () => leave(null)),
  );
  element.append(make("h2", "", say(turn.role)), area, foot);
  return element;
}

function makeButton(name, say, act) {
  const button = make("button", name, say(name));
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

// Enter sends, but not the one that ends an input method's composition, as of Chinese.
export function sendByEnter(area, send) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
}
