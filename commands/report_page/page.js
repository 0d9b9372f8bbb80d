"use strict";

// Tables of rows: only those that contain a text.
document.addEventListener("input", ({ target }) => {
  const wanted = target.value.toLowerCase();
  for (const row of document.querySelectorAll(`#${target.dataset.rows} tbody tr`)) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  }
});

// A part of the page that somebody has opened or filtered is left alone.
function isInUse(part) {
  return part.querySelector("details[open]") || [...part.querySelectorAll("input")].some((input) => input.value);
}

// Served while a run trains: the page is asked for again, and what changes is replaced.
async function refresh() {
  const state = document.getElementById("state");
  try {
    const response = await fetch(location.href, { cache: "no-store" });
    const text = await response.text();
    if (!response.ok) throw new Error(text);
    const fresh = new DOMParser().parseFromString(text, "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const newer = fresh.getElementById(part.id);
      if (newer && !isInUse(part)) part.replaceChildren(...newer.childNodes);
    }
    state.textContent = fresh.getElementById("state").textContent;
    if (!fresh.body.dataset.refresh) clearInterval(timer);
  } catch (error) {
    state.textContent = `this is what was seen last; now: ${error.message}`;
  }
}

const seconds = Number(document.body.dataset.refresh);
const timer = seconds ? setInterval(refresh, 1000 * seconds) : null;
