// Requests to the server that sent this page.

export class ApiError extends Error {
  // status: of HTTP; 0: the server cannot be reached, or went away.
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, key, options = {}) {
  if (key && !/^[!-~]+$/.test(key)) throw new ApiError("", 401); // what no header can carry is not the key
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", 0);
  }
  if (response.ok) return response;
  const body = await response.text();
  throw new ApiError(readMessage(body), response.status);
}

function readMessage(body) {
  try {
    return JSON.parse(body).error.message;
  } catch {
    return body.slice(0, 500);
  }
}

// What the page shows of the model: name, stop_tokens, system_message, decoding.
export async function readModel(key) {
  return (await request("page/model.json", key)).json();
}

// The pieces of an answer as they come: {content, reasoning, finishReason, numTokens}, each with what is new.
// Throws ApiError, also where the stream ends before the answer does; AbortError by signal.
export async function* streamAnswer(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", body: JSON.stringify(streamed), signal };
  const response = await request("v1/chat/completions", key, options);
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 500);
    const choice = chunk.choices[0];
    yield {
      content: choice?.delta.content ?? "",
      reasoning: choice?.delta.reasoning_content ?? "",
      finishReason: choice?.finish_reason,
      numTokens: chunk.usage?.completion_tokens,
    };
  }
  throw new ApiError("", 0);
}

// The data of server-sent events.
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("", 0);
    }
    if (part.done) return;
    const events = (waiting + part.value).split("\n\n");
    waiting = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}
