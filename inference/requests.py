"""A chat request in OpenAI's form: checked, with nothing in it that would be ignored. No model, no server."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_utils.schema import Conversation, parse_record
from data_utils.sources import DataError, Record
from data_utils.turns import describe_kind, says_something
from inference.decoding import SETTINGS, read_setting
from tuning.errors import SettingsError

DEFAULT_MAX_TOKENS = 2048
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1000
_MAX_TOP_LOGPROBS = 20
# What changes no answer.
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}
# Fields with one value that says what is done anyway.
_ONLY: dict[str, Any] = {
    "n": 1,
    "store": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_READ = {
    *("model", "messages", "tools", "tool_choice", "chat_template_kwargs"),
    *("stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "seed"),
    *("temperature", "top_p", "top_k", "repetition_penalty"),
    *("logprobs", "top_logprobs", "return_token_ids"),
}


class RequestError(ValueError):
    """What is wrong with a request. status: of HTTP; param: the field; code: as OpenAI names it."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """The body of the response, as OpenAI's clients read it."""
        return describe_error(str(self), self.status, param=self.param, code=self.code)


def describe_error(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks for.

    max_tokens: None where the request does not say. decoding: settings of inference/decoding.py that it names.
    top_logprobs: likeliest tokens to tell of in each place; None: no log probabilities. return_token_ids: as vLLM has
    it: the ids of prompt and answer.
    """

    conversation: Conversation
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    seed: int | None = None
    decoding: dict[str, int | float] = field(default_factory=dict)
    top_logprobs: int | None = None
    return_token_ids: bool = False


def read_request(body: dict[str, Any], model_name: str) -> ChatRequest:
    """Check the body of a request to /v1/chat/completions. Raises: RequestError."""
    name = body.get("model")
    if name is None:
        raise RequestError(f"model: missing; this server has {model_name}", param="model")
    if name != model_name:
        raise model_not_found(name, model_name)
    for key, value in body.items():
        if key in _READ or key in _LABELS or value is None:
            continue
        if key not in _ONLY:
            raise RequestError(f"{key}: not supported here; leave it out", param=key)
        if says_something(value) and value != _ONLY[key]:
            raise RequestError(f"{key}: only {_ONLY[key]!r} is supported here; leave it out", param=key)
    stream = _read_bool(body, "stream")
    streaming = body.get("stream_options") or {}
    if not isinstance(streaming, dict) or streaming.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options: expected an object with include_usage", param="stream_options")
    if streaming and not stream:
        raise RequestError("stream_options: only with stream", param="stream_options")
    stops, top_logprobs = _read_stops(body.get("stop")), _read_logprobs(body)
    return_token_ids = _read_bool(body, "return_token_ids")
    for name, wanted in (("logprobs", top_logprobs is not None), ("return_token_ids", return_token_ids)):
        if wanted and (stream or stops):
            raise RequestError(f"{name}: not with {'stream' if stream else 'stop'} here", param=name)
    return ChatRequest(
        _read_conversation(body),
        stream=stream,
        include_usage=_read_bool(streaming, "include_usage"),
        max_tokens=_read_max_tokens(body),
        stops=stops,
        seed=_read_whole(body, "seed"),
        decoding=_read_decoding(body),
        top_logprobs=top_logprobs,
        return_token_ids=return_token_ids,
    )


def model_not_found(name: Any, model_name: str) -> RequestError:
    """Of a request for another model than is served."""
    message = f"the model {str(name)[:200]!r} is not served here; this server has {model_name}"
    return RequestError(message, status=404, param="model", code="model_not_found")


def limit_tokens(request: ChatRequest, num_prompt_tokens: int, context: int | None) -> int:
    """How many tokens an answer may have. context: tokens that the model takes, where that is known.

    Raises: RequestError: prompt and answer are longer than that.
    """
    wanted = request.max_tokens
    if context is None:
        return wanted or DEFAULT_MAX_TOKENS
    if num_prompt_tokens + (wanted or 1) > context:
        asked = f" and max_tokens asks for {wanted:,}" if wanted else ", which leaves no room for an answer"
        raise RequestError(
            f"the model takes {context:,} tokens; the messages have {num_prompt_tokens:,}{asked}: shorten them"
            + (", or lower max_tokens" if wanted else ""),
            param="messages",
            code="context_length_exceeded",
        )
    return wanted or min(DEFAULT_MAX_TOKENS, context - num_prompt_tokens)


def _read_conversation(body: dict[str, Any]) -> Conversation:
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise RequestError("messages: expected a list of messages", param="messages")
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError("tool_choice: only 'auto' and 'none' are supported here", param="tool_choice")
    row: dict[str, Any] = {"messages": body["messages"]}
    if choice != "none" and body.get("tools") is not None:  # what it is not told of, it does not call
        if not isinstance(body["tools"], list):
            raise RequestError(f"tools: expected a list, found {describe_kind(body['tools'])}", param="tools")
        row["tools"] = body["tools"]
    if body.get("chat_template_kwargs") is not None:
        row["chat_template_kwargs"] = body["chat_template_kwargs"]
    try:
        conversation = parse_record(Record(row, "request", 0), data_format="messages")
    except DataError as error:
        message = str(error).removeprefix("request: ")
        raise RequestError(message, param="tools" if message.startswith("tools") else "messages") from None
    if conversation.messages[-1]["role"] == "assistant":
        raise RequestError("messages: the last one is the assistant's, so nothing is asked", param="messages")
    return conversation


def _read_max_tokens(body: dict[str, Any]) -> int | None:
    given = {name: _read_whole(body, name) for name in ("max_completion_tokens", "max_tokens")}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise RequestError("max_tokens: says other than max_completion_tokens; keep one", param="max_tokens")
    if any(value < 1 for value in values):
        raise RequestError("max_tokens: must be at least 1", param="max_tokens")
    return min(values, default=None)


def _read_stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    fits = isinstance(stops, list) and len(stops) <= _MAX_STOPS
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops):
        raise RequestError(f"stop: expected a text, or up to {_MAX_STOPS} of them, none empty", param="stop")
    return tuple(stops)


def _read_logprobs(body: dict[str, Any]) -> int | None:
    number = _read_whole(body, "top_logprobs") or 0
    if not 0 <= number <= _MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs: must be from 0 to {_MAX_TOP_LOGPROBS}", param="top_logprobs")
    if _read_bool(body, "logprobs"):
        return number
    if number:
        raise RequestError("top_logprobs: only with logprobs", param="top_logprobs")
    return None


def _read_decoding(body: dict[str, Any]) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    for name in SETTINGS.keys() & body.keys() - {"max_new_tokens"}:
        value = body[name]
        if value is None:
            continue
        if not _is_number(value):
            raise RequestError(f"{name}: expected a number, found {describe_kind(value)}", param=name)
        try:
            found[name] = read_setting(name, str(value))
        except SettingsError as error:
            raise RequestError(f"{name} {value}: {error}", param=name) from None
    return found


def _read_whole(body: dict[str, Any], name: str) -> int | None:
    return _read(body, name, "a whole number", lambda v: type(v) is int and abs(v) < 2**63)


def _read_bool(body: dict[str, Any], name: str) -> bool:
    return bool(_read(body, name, "true or false", lambda value: isinstance(value, bool)))


def _read(body: dict[str, Any], name: str, what: str, fits: Callable[[Any], bool]) -> Any:
    value = body.get(name)
    if value is not None and not fits(value):
        raise RequestError(f"{name}: expected {what}, found {describe_kind(value)}", param=name)
    return value


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (isinstance(value, float) and math.isfinite(value))
