// The numbers of a request, as they stand in the fields. An empty field is not sent.

export const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

export class FieldError extends Error {}

// Throws FieldError: no number, or one that JavaScript would round. The server checks the rest.
export function readNumbers(say) {
  const found = {};
  for (const id of NUMBERS) {
    const text = document.getElementById(id).value.trim();
    const value = Number(text);
    const isExact = Number.isFinite(value) && (!Number.isInteger(value) || Number.isSafeInteger(value));
    if (text && !isExact) throw new FieldError(say("notNumber", id));
    if (text) found[id] = value;
  }
  return found;
}
