"""Records to conversations: one shape for every format, with errors that name file:line:field.

conversations  [{"from", "value"}, ...]           the original format; ShareGPT's roles
messages       [{"role", "content"}, ...]         OpenAI's, with tool_calls and reasoning_content
alpaca         instruction, input, output, history
prompt         prompt, completion                 text, or lists of messages
text           text                               no conversation: every token is trained
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_utils.sources import DataError, Record

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
# A row's format is told by the first of these keys.
FORMATS = {
    "conversations": ("conversations",),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
_ROW_KEYS = {"tools", "system", "chat_template_kwargs"}
_TURN_KEYS = {"name", "id", "train", "loss", "loss_weight", "weight", "tool_calls", "reasoning_content", "tool_call_id"}
_WEIGHTS = ("train", "loss", "loss_weight", "weight")


@dataclass(frozen=True)
class Conversation:
    """One conversation in the form chat templates take.

    id: the row's own `id`, or the file's name and the row's number.
    messages: [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...]; an assistant's may have
        "tool_calls" ([{"type": "function", "function": {"name", "arguments": object}}]) and "reasoning_content".
    where: `file:line`, for messages.
    weights: of the loss of each assistant turn, by its index; 0 is not trained.
    tools: [{"type": "function", "function": {...}}, ...]. template_kwargs: variables for the template.
    text: instead of messages, text of which every token is trained.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    where: str
    weights: dict[int, float] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    text: str | None = None

    @property
    def supervised_turns(self) -> list[int]:
        """Indices of the messages that are trained."""
        return [index for index, weight in sorted(self.weights.items()) if weight > 0]


def parse_record(
    record: Record, *, name: str = "", data_format: str | None = None, supervise: str = "all"
) -> Conversation:
    """Check one record and turn it into a Conversation.

    name: of the file; a row without an id gets `name-<row number>`.

    data_format: a key of FORMATS; None tells it by the row's keys.
    supervise: "all" assistant turns, or only the "last".

    Raises: DataError: names `file:line: field: what is wrong` and the way out.
    """
    row, where = record.value, record.where
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with 'conversations' or 'messages', not {_kind(row)}")
    row_format = data_format or _tell_format(row, where)
    if missing := [key for key in FORMATS[row_format] if key not in row]:
        raise DataError(f"{where}: no '{missing[0]}' in the row, which {row_format} rows have")
    for key in ("functions", "weight", "loss", "loss_weight"):
        if row.get(key) not in (None, "", []):
            raise DataError(f"{where}: {key}: not supported in a row; " + _INSTEAD.get(key, "write it into the turns"))
    row_id = f"{name}-{record.index}" if row.get("id") is None else _check_text(str(row["id"]), f"{where}: id")
    if row_format == "text":
        return _parse_text(row, row_id, where)
    turns, first_trained = _TURNS[row_format](row, where)
    turns = [turn for turn in turns if turn is not None]
    system = row.get("system")
    if system not in (None, ""):
        if turns and turns[0][0]["role"] == "system":
            raise DataError(f"{where}: system: the turns begin with a system turn, too; keep one of them")
        turns.insert(0, ({"role": "system", "content": _check_text(system, f"{where}: system")}, None, "system"))
        first_trained += 1
    messages = tuple(message for message, *_ in turns)
    weights = {
        index: (1.0 if weight is None else weight) if index >= first_trained else 0.0
        for index, (message, weight, _) in enumerate(turns)
        if message["role"] == "assistant"
    }
    _check_order(turns, where)
    if supervise == "last" and weights:
        weights = {index: weight if index == max(weights) else 0.0 for index, weight in weights.items()}
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict) or not all(str(key).isidentifier() for key in kwargs):
        raise DataError(f"{where}: chat_template_kwargs: expected an object of template variables")
    tools = tuple(_parse_tools(row["tools"], f"{where}: tools")) if row.get("tools") not in (None, "", []) else ()
    return Conversation(row_id, messages, where, weights, tools, kwargs)


_INSTEAD = {"functions": "call it 'tools'"}
_Turn = tuple[dict[str, Any], float | None, str]  # message, weight if given, where it stands


def _tell_format(row: dict[str, Any], where: str) -> str:
    found = [name for name, keys in FORMATS.items() if keys[0] in row]
    if not found:
        keys = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: no 'conversations' or 'messages' in the row (its keys: {keys})")
    if len(found) > 1:
        first, second = (FORMATS[name][0] for name in found[:2])
        raise DataError(f"{where}: both '{first}' and '{second}' in one row; keep one, or say --data_format {found[0]}")
    return found[0]


def _parse_text(row: dict[str, Any], row_id: str, where: str) -> Conversation:
    text = _check_text(row["text"], f"{where}: text")
    if not text.strip():
        raise DataError(f"{where}: text: empty")
    for key in _ROW_KEYS & row.keys():
        raise DataError(f"{where}: {key}: has no effect on plain text; remove it")
    return Conversation(row_id, (), where, text=text)


# ---- the formats' turns, and the index of the first that may be trained ----


def _conversation_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return list(_parse_turns(row["conversations"], f"{where}: conversations", "from", "value")), 0


def _message_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return list(_parse_turns(row["messages"], f"{where}: messages", "role", "content")), 0


def _alpaca_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    turns: list[_Turn] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: history: expected a list of [question, answer]")
    texts = [_check_text(row[key], f"{where}: {key}") for key in ("instruction", "output")]
    given = _check_text(row.get("input") or "", f"{where}: input")
    question = "\n".join(text for text in (texts[0], given) if text)
    for index, (asked, answered) in enumerate([*history, [question, texts[1]]]):
        for number, (role, text) in enumerate((("user", asked), ("assistant", answered))):
            last = index == len(history)
            at = f"{where}: {('instruction', 'output')[number] if last else f'history[{index}][{number}]'}"
            message = {"role": role, "content": _check_text(text, at)}
            _check_answer(message, at)
            turns.append((message, None, at))
    return turns, 0


def _prompt_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    sides: list[list[_Turn]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        at = f"{where}: {key}"
        if isinstance(row[key], str):
            message = {"role": role, "content": _check_text(row[key], at)}
            _check_answer(message, at)
            sides.append([(message, None, at)])
        else:
            sides.append(list(_parse_turns(row[key], at, "role", "content")))
    return [*sides[0], *sides[1]], len(sides[0])


_TURNS = {
    "conversations": _conversation_turns,
    "messages": _message_turns,
    "alpaca": _alpaca_turns,
    "prompt": _prompt_turns,
}


def _parse_turns(turns: Any, where: str, role_key: str, content_key: str) -> Iterator[_Turn]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected a list of turns, found {_kind(turns)}")
    for index, turn in enumerate(turns):
        at = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(f"{at}: a turn must be an object with '{role_key}' and '{content_key}', not {_kind(turn)}")
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
        reasoning = _check_text(turn["reasoning_content"], f"{at}.reasoning_content")
        message |= {"reasoning_content": reasoning, "thinking": reasoning}  # as templates call it (gpt-oss: thinking)
    for key in ("name", "tool_call_id") if role == "tool" else ():
        if turn.get(key):
            message[key] = _check_text(turn[key], f"{at}.{key}")
    _check_answer(message, f"{at}.{content_key}")
    return message, _parse_weight(turn, role, at)


def _parse_content(content: Any, at: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        for index, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
                kind = part.get("type", "part") if isinstance(part, dict) else _kind(part)
                raise DataError(f"{at}[{index}]: {kind}: only parts of text are supported")
        return "".join(_check_text(part["text"], f"{at}[{index}].text") for index, part in enumerate(content))
    return _check_text(content, at)


def _parse_weight(turn: dict[str, Any], role: str, at: str) -> float | None:
    given = [key for key in _WEIGHTS if turn.get(key) is not None]
    if not given:
        return None
    key = given[0]
    if len(given) > 1:
        raise DataError(f"{at}.{given[1]}: says the same as '{key}'; keep one of them")
    value = turn[key]
    if key == "train" and not isinstance(value, bool):
        raise DataError(f"{at}.train: expected true or false, found {_kind(value)}")
    if not isinstance(value, bool | int | float) or not (value == 0 or 1e-6 <= value <= 1000):
        shown = repr(value) if isinstance(value, float) or not isinstance(value, int) else "a larger one"
        raise DataError(f"{at}.{key}: expected 0, or a number up to 1000 and not below 1e-6; found {shown:.40}")
    if role != "assistant" and value:
        raise DataError(f"{at}.{key}: only assistant turns are trained; remove it")
    return float(value)


# ---- tools ----


def _parse_tools(tools: Any, at: str) -> Iterator[dict[str, Any]]:
    if isinstance(tools, str):
        tools = _decode(tools, at, "a list of tools as JSON")
    for index, tool in enumerate(tools if tools == [] else _listed(tools, at)):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{at}[{index}]: expected a function with a name, found {_kind(tool)}")
        _check_strings(function, f"{at}[{index}]")
        yield {"type": "function", "function": function}


def _parse_call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{at}: expected a call with the function's name and arguments, found {_kind(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes them as text; templates would write that text in quotes
        arguments = _decode(arguments, f"{at}.arguments", "the arguments as JSON") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{at}.arguments: expected an object, found {_kind(arguments)}")
    _check_strings(function, at)
    _check_strings(arguments, f"{at}.arguments")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        parsed["id"] = _check_text(call["id"], f"{at}.id")
    return parsed


def _decode(text: Any, at: str, what: str) -> Any:
    if not isinstance(text, str):
        raise DataError(f"{at}: expected {what}, found {_kind(text)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{at}: expected {what}: {error}") from None


def _listed(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{at}: expected a list, found {_kind(value)}")
    return value


# ---- checks ----


def _check_order(turns: list[_Turn], where: str) -> None:
    if not turns:
        raise DataError(f"{where}: no turns in the row")
    for message, _, at in turns[1:]:
        if message["role"] == "system":
            raise DataError(f"{at}: a system turn can only be the first turn")
    first = 1 if turns[0][0]["role"] == "system" else 0
    if first < len(turns) and turns[first][0]["role"] == "assistant":
        raise DataError(
            f"{turns[first][2]}: a conversation cannot begin with the assistant; add the user turn it answers, or "
            "remove the turn"
        )


def _check_answer(message: dict[str, Any], at: str) -> None:
    empty = not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content")
    if message["role"] == "assistant" and empty:
        raise DataError(f"{at}: empty assistant turn; write the answer or remove the turn")


def _check_text(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{at}: expected text, found {_kind(text)}")
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"{at}: holds half a surrogate pair (\\ud8xx), which is no character")
    return text


def _check_strings(value: Any, at: str) -> None:
    """Check every text inside a JSON value."""
    if isinstance(value, str):
        _check_text(value, at)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_text(name, at)
            _check_strings(inner, f"{at}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_strings(inner, f"{at}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float):
        raise DataError(f"{at}: a {type(value).__name__} is no JSON value; write it as text or a number")


def _kind(value: Any) -> str:
    if value == [] or value == {}:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
