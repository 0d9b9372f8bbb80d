"""One turn of a conversation, its tool calls, and the tools of a row: checked, in the form that chat templates take.

Raises everywhere: DataError: names `file:line: field: what is wrong` and the way out.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from data_utils.sources import DataError

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_TURN_KEYS = {"name", "id", "train", "loss", "loss_weight", "weight", "tool_calls", "reasoning_content", "tool_call_id"}
_WEIGHTS = ("train", "loss", "loss_weight", "weight")
Turn = tuple[dict[str, Any], float | None, str]  # message, weight if given, where it stands


def parse_turns(turns: Any, where: str, role_key: str, content_key: str) -> Iterator[Turn]:
    """Yield the turns of a list. role_key, content_key: as the row's format calls them."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected a list of turns, found {describe_kind(turns)}")
    for index, turn in enumerate(turns):
        at = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{at}: a turn must be an object with '{role_key}' and '{content_key}', not {describe_kind(turn)}"
            )
        yield *_parse_turn(turn, at, role_key, content_key), f"{at}.{role_key}"


def _parse_turn(turn: dict[str, Any], at: str, role_key: str, content_key: str) -> tuple[dict[str, Any], float | None]:
    calls = turn.get("tool_calls")
    for key in (role_key, content_key):
        if key not in turn and not (key == content_key and calls):
            raise DataError(f"{at}: no '{key}' in the turn")
    named = turn[role_key]
    if not isinstance(named, str) or named not in ROLES:
        raise DataError(f"{at}.{role_key}: {named!r} is not a role ({', '.join(ROLES)})")
    # A key that changes what the turn says must not be passed over: something else would be trained.
    for key in sorted(turn.keys() - {role_key, content_key} - _TURN_KEYS):
        if turn[key] is not None:
            raise DataError(f"{at}.{key}: not supported in a turn; remove it or convert the row")
    role = ROLES[named]
    content = turn.get(content_key)
    message: dict[str, Any] = {"role": role}
    if named == "function_call":
        calls, content = _decode(content, f"{at}.{content_key}", "a call as JSON"), ""
        calls = calls if isinstance(calls, list) else [calls]
    message["content"] = _parse_content("" if content is None and calls else content, f"{at}.{content_key}")
    if calls:
        if role != "assistant":
            raise DataError(f"{at}.tool_calls: only the assistant calls tools")
        message["tool_calls"] = [
            _parse_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(_listed(calls, at))
        ]
    if turn.get("reasoning_content"):
        if role != "assistant":
            raise DataError(f"{at}.reasoning_content: only the assistant reasons")
        reasoning = check_text(turn["reasoning_content"], f"{at}.reasoning_content")
        message |= {"reasoning_content": reasoning, "thinking": reasoning}  # as templates call it (gpt-oss: thinking)
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if turn.get(key):
            message[key] = check_text(turn[key], f"{at}.{key}")
    check_answer(message, f"{at}.{content_key}")
    return message, _parse_weight(turn, role, at)


def _parse_content(content: Any, at: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
                kind = part.get("type", "part") if isinstance(part, dict) else describe_kind(part)
                raise DataError(f"{at}[{index}]: {kind}: only parts of text are supported")
        return "".join(check_text(part["text"], f"{at}[{index}].text") for index, part in enumerate(content))
    return check_text(content, at)


def _parse_weight(turn: dict[str, Any], role: str, at: str) -> float | None:
    given = [key for key in _WEIGHTS if turn.get(key) is not None]
    if not given:
        return None
    key = given[0]
    if len(given) > 1:
        raise DataError(f"{at}.{given[1]}: says the same as '{key}'; keep one of them")
    value = turn[key]
    if key == "train" and not isinstance(value, bool):
        raise DataError(f"{at}.train: expected true or false, found {describe_kind(value)}")
    if not isinstance(value, bool | int | float) or not (value == 0 or 1e-6 <= value <= 1000):
        shown = repr(value) if isinstance(value, float) or not isinstance(value, int) else "a larger one"
        raise DataError(f"{at}.{key}: expected 0, or a number up to 1000 and not below 1e-6; found {shown:.40}")
    if role != "assistant" and value:
        raise DataError(f"{at}.{key}: only assistant turns are trained; remove it")
    return float(value)


# ---- tools ----


def parse_tools(tools: Any, at: str) -> Iterator[dict[str, Any]]:
    """Yield a row's tools as {"type": "function", "function": {...}}, from a list or that list as JSON text."""
    if isinstance(tools, str):
        tools = _decode(tools, at, "a list of tools as JSON")
    for index, tool in enumerate(tools if tools == [] else _listed(tools, at)):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{at}[{index}]: expected a function with a name, found {describe_kind(tool)}")
        _check_strings(function, f"{at}[{index}]")
        yield {"type": "function", "function": function}


def _parse_call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{at}: expected a call with the function's name and arguments, found {describe_kind(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes them as text; templates would write that text in quotes
        arguments = _decode(arguments, f"{at}.arguments", "the arguments as JSON") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{at}.arguments: expected an object, found {describe_kind(arguments)}")
    _check_strings(function, at)
    _check_strings(arguments, f"{at}.arguments")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        parsed["id"] = check_text(call["id"], f"{at}.id")
    return parsed


def _decode(text: Any, at: str, what: str) -> Any:
    if not isinstance(text, str):
        raise DataError(f"{at}: expected {what}, found {describe_kind(text)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: expected {what}: {error}") from None


def _listed(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{at}: expected a list, found {describe_kind(value)}")
    return value


# ---- checks ----


def check_answer(message: dict[str, Any], at: str) -> None:
    """Refuse an assistant turn that says nothing."""
    empty = not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content")
    if message["role"] == "assistant" and empty:
        raise DataError(f"{at}: empty assistant turn; write the answer or remove the turn")


def check_text(text: Any, at: str) -> str:
    """Return the text, if it is text that can be encoded as UTF-8."""
    if not isinstance(text, str):
        raise DataError(f"{at}: expected text, found {describe_kind(text)}")
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"{at}: holds half a surrogate pair (\\ud8xx), which is no character")
    return text


def _check_strings(value: Any, at: str) -> None:
    """Check every text inside a JSON value."""
    if isinstance(value, str):
        check_text(value, at)
    elif isinstance(value, dict):
        for name, inner in value.items():
            check_text(name, at)
            _check_strings(inner, f"{at}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_strings(inner, f"{at}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float):
        raise DataError(f"{at}: a {type(value).__name__} is no JSON value; write it as text or a number")


def describe_kind(value: Any) -> str:
    """Name the JSON type of a value, for messages."""
    if value == [] or value == {}:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
