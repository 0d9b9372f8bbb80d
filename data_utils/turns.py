"""One turn of a conversation, its tool calls, and the tools of a row: checked, in the form that chat templates take.

Raises everywhere: DataError: names `file:line: field: what is wrong` and the way out.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from data_utils.sources import DataError, decode_json, without_nulls

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
}
# What others call a role, too loosely to take it without a word.
_MEANT = {
    **dict.fromkeys(
        ("bot", "model", "ai", "chatbot", "agent", "chatgpt", "gpt4", "gpt-4", "output", "answer"), "assistant"
    ),
    **dict.fromkeys(("customer", "client", "prompter", "person", "input", "question", "instruction"), "user"),
    **{name.lower(): role for name, role in ROLES.items()},
}
_FROM = {"assistant": "gpt", "user": "human", "system": "system", "tool": "observation"}
_CALL_ROLES = ("function_call", "tool_call")  # their text is a call, or a list of calls, as JSON
_TURN_KEY_PAIRS = (("from", "value"), ("role", "content"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_RESULT_KEYS = {"name", "tool_call_id"}  # of a tool's turn: which call it answers
_WEIGHTS = ("train", "loss", "loss_weight", "weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_ARGUMENTS = ("arguments", "parameters", "args")
_CALL_KEYS, _CALL_TYPES = {"id", "index", "type"}, ("function", "tool_call", None)
_TURN_KEYS = {"id", "tool_calls", "function_call", *_REASONING, *_WEIGHTS}
_TOOL_KEYS = {"type", "function"}
Turn = tuple[dict[str, Any], float | None, str]  # message, weight if given, where it stands


def parse_turns(turns: Any, where: str, role_key: str, content_key: str) -> Iterator[Turn]:
    """Yield the turns of a list. role_key, content_key: as the row's format calls them; a turn may use the other's."""
    if isinstance(turns, str):  # tables hold it as text
        turns = decode_text(turns, where, "a list of turns as JSON")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected a list of turns, found {describe_kind(turns)}")
    for index, turn in enumerate(turns):
        at = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{at}: a turn must be an object with '{role_key}' and '{content_key}', not {describe_kind(turn)}"
            )
        keys = [pair for pair in ((role_key, content_key), *_TURN_KEY_PAIRS) if pair[0] in turn]
        yield *_parse_turn(turn, at, *(keys[0] if keys else (role_key, content_key))), f"{at}.{role_key}"


def check_keys(value: dict[str, Any], known: Collection[str], at: str, what: str) -> None:
    """Refuse a key that nothing reads: something else would be trained. One that says nothing is passed over."""
    for key in sorted(value.keys() - known):
        if says_something(value[key]):
            raise DataError(f"{at}.{key}: not supported in {what}; remove it or convert the row")


def _parse_turn(turn: dict[str, Any], at: str, role_key: str, content_key: str) -> tuple[dict[str, Any], float | None]:
    calls = turn.get("tool_calls")
    if turn.get("function_call"):  # as OpenAI wrote one call before it had tool_calls
        if calls:
            raise DataError(f"{at}.function_call: says the same as 'tool_calls'; keep one of them")
        calls = [turn["function_call"]]
    for key in (role_key, content_key):
        if key not in turn and not (key == content_key and calls):
            raise DataError(f"{at}: no '{key}' in the turn")
    named = turn[role_key]
    if not isinstance(named, str) or named not in ROLES:
        meant = _MEANT.get(named.lower()) if isinstance(named, str) else None
        hint = f"; did you mean {meant if role_key == 'role' else _FROM[meant]}?" if meant else ""
        raise DataError(f"{at}.{role_key}: {named!r} is not a role ({', '.join(ROLES)}){hint}")
    role = ROLES[named]
    known = {role_key, content_key} | _TURN_KEYS | (_RESULT_KEYS if role == "tool" else set())
    check_keys(turn, known, at, "a turn")
    content = turn.get(content_key)
    message: dict[str, Any] = {"role": role}
    if named in _CALL_ROLES:
        calls, content = decode_text(content, f"{at}.{content_key}", "a call as JSON"), ""
        calls = calls if isinstance(calls, list) else [calls]
    message["content"] = _parse_content("" if content is None and calls else content, f"{at}.{content_key}")
    if calls:
        if role != "assistant":
            raise DataError(f"{at}.tool_calls: only the assistant calls tools")
        calls = decode_text(calls, f"{at}.tool_calls", "a list of calls as JSON") if isinstance(calls, str) else calls
        message["tool_calls"] = [
            _parse_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(_listed(calls, f"{at}.tool_calls"))
        ]
    for key in [key for key in _REASONING if turn.get(key)]:
        if role != "assistant":
            raise DataError(f"{at}.{key}: only the assistant reasons")
        if "thinking" in message:
            raise DataError(f"{at}.{key}: a turn has one reasoning; keep one of {', '.join(_REASONING)}")
        reasoning = check_text(turn[key], f"{at}.{key}")
        message |= {"reasoning_content": reasoning, "thinking": reasoning}  # as templates call it (gpt-oss: thinking)
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if turn.get(key):
            message[key] = check_text(turn[key], f"{at}.{key}")
    check_answer(message, f"{at}.{content_key}")
    return message, _parse_weight(turn, role, at)


def _parse_content(content: Any, at: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        return "".join(_parse_part(part, f"{at}[{index}]") for index, part in enumerate(content))
    return check_text(content, at)


def _parse_part(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        raise DataError(f"{at}: expected a part such as {{'type': 'text', 'text': ...}}, found {describe_kind(part)}")
    if part.get("type") != "text":
        raise DataError(f"{at}: {part.get('type', 'no type')}: only parts of text are supported")
    if "text" not in part:
        raise DataError(f"{at}: no 'text' in the part")
    check_keys(part, {"type", "text"}, at, "a part")
    return check_text(part["text"], f"{at}.text")


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
        tools = decode_text(tools, at, "a list of tools as JSON")
    for index, tool in enumerate(tools if tools == [] else _listed(tools, at)):
        yield {"type": "function", "function": _parse_tool(without_nulls(tool), f"{at}[{index}]")}


def _parse_tool(tool: Any, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        found = f"type {tool['type']!r}" if isinstance(tool, dict) else describe_kind(tool)
        raise DataError(f"{at}: expected a function with a name, found {found:.200}")
    if "function" in tool:
        check_keys(tool, _TOOL_KEYS, at, "a tool, beside its function")
        function = tool["function"]
    else:  # the function itself
        function = {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{at}: expected a function with a name, found {describe_kind(tool)}")
    if isinstance(function.get("parameters"), str):
        parameters = decode_text(function["parameters"], f"{at}.parameters", "the parameters as JSON")
        function = {**function, "parameters": parameters}
    _check_strings(function, at)
    return function


def _parse_call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{at}: expected a call with the function's name and arguments, found {describe_kind(call)}")
    if call.get("type", "function") not in _CALL_TYPES:
        raise DataError(f"{at}.type: {call['type']!r} is no call of a function; convert the row")
    if function is call:
        check_keys(call, _CALL_KEYS | {"name", *_ARGUMENTS}, at, "a call")
    else:
        check_keys(call, _CALL_KEYS | {"function"}, at, "a call, beside its function")
        check_keys(function, {"name", *_ARGUMENTS}, f"{at}.function", "a call's function")
    given = [key for key in _ARGUMENTS if says_something(function.get(key))]
    if len(given) > 1:
        raise DataError(f"{at}.{given[1]}: says the same as '{given[0]}'; keep one of them")
    key = given[0] if given else "arguments"
    arguments = function[key] if given else {}
    if isinstance(arguments, str):  # OpenAI writes them as text; templates would write that text in quotes
        arguments = decode_text(arguments, f"{at}.{key}", "the arguments as JSON") if arguments.strip() else {}
    else:
        arguments = without_nulls(arguments)
    if not isinstance(arguments, dict):
        raise DataError(f"{at}.{key}: expected an object, found {describe_kind(arguments)}")
    check_text(function["name"], f"{at}.name")
    _check_strings(arguments, f"{at}.{key}")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        parsed["id"] = check_text(call["id"], f"{at}.id")
    return parsed


def decode_text(text: Any, at: str, what: str) -> Any:
    """Parse JSON text. what: what it should be, for the message."""
    if not isinstance(text, str):
        raise DataError(f"{at}: expected {what}, found {describe_kind(text)}")
    try:
        return decode_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: expected {what}: {error}") from None


def _listed(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{at}: expected a list, found {describe_kind(value)}")
    return value


# ---- checks ----


def says_something(value: Any) -> bool:
    """Whether a value is more than an empty field, as datasets fill in what a row does not have."""
    return value not in (None, "", [], {})


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
