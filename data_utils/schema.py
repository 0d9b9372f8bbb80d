"""Records to conversations: one shape for every format, with errors that name file:line:field.

conversations  [{"from", "value"}, ...]           the original format; ShareGPT's roles
messages       [{"role", "content"}, ...]         OpenAI's, with tool_calls and reasoning_content
alpaca         instruction, input, output, history
query          query, response, history           ms-swift's
prompt         prompt, completion                 text, or lists of messages
text           text                               no conversation: every token is trained

A row with the keys of several formats is read by the first of them in this list, except that `conversations` and
`messages` in one row contradict. Keys of a row that nothing reads are named in the account.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_utils.sources import DataError, Record, as_line
from data_utils.turns import (
    Turn,
    check_answer,
    check_text,
    decode_text,
    describe_kind,
    parse_tools,
    parse_turns,
    says_something,
)

# A row's format is told by the first of these keys.
FORMATS = {
    "conversations": ("conversations",),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "query": ("query", "response"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
_ROW_KEYS = {"tools", "system", "chat_template_kwargs"}
# Keys of a row that say what is to be trained, or hold a part of what is said: passed over, other things are trained.
_REFUSED = {
    "functions": "call it 'tools'",
    **dict.fromkeys(("train", "weight", "loss", "loss_weight"), "write it into the turns"),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"), "this trains on texts; remove it and its marks"
    ),
    "documents": "write them into a turn",
    **dict.fromkeys(("chosen", "rejected", "rejected_response"), "this trains on answers, not on preferences"),
}
_MAX_ID = 200  # characters of a row's own id that are kept


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
    places: `field` of each message, for messages. unread: keys of the row that nothing reads.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    where: str
    weights: dict[int, float] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    places: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def supervised_turns(self) -> list[int]:
        """Indices of the messages that are trained."""
        return [index for index, weight in sorted(self.weights.items()) if weight > 0]


def parse_record(
    record: Record,
    *,
    name: str = "",
    data_format: str | None = None,
    supervise: str = "all",
    names: Mapping[str, str] | None = None,
) -> Conversation:
    """Check one record and turn it into a Conversation.

    name: of the file; a row without an id gets `name-<row number>`.

    data_format: a key of FORMATS; None tells it by the row's keys.
    supervise: "all" assistant turns, or only the "last".
    names: what the row and its turns call our keys.

    Raises: DataError: names `file:line: field: what is wrong` and the way out.
    """
    row, where = record.value, record.where
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a row must be an object with 'conversations' or 'messages', not {describe_kind(row)}"
        )
    if names:
        row = rename_keys(row, names, where)
    row_format = data_format or _tell_format(row, where)
    if missing := [key for key in FORMATS[row_format] if key not in row]:
        raise DataError(f"{where}: no '{missing[0]}' in the row, which {row_format} rows have")
    for key, instead in _REFUSED.items():
        if says_something(row.get(key)):
            raise DataError(f"{where}: {key}: not supported in a row; {instead}")
    if isinstance(row.get("label"), bool):
        raise DataError(f"{where}: label: not supported in a row; this trains on answers, not on preferences")
    row_id = as_line(f"{name}-{record.index}" if row.get("id") is None else str(row["id"]), _MAX_ID)
    read = {*FORMATS[row_format], *_ROW_KEYS, *_READ_BY.get(row_format, ()), "id", *_REFUSED}
    unread = tuple(as_line(str(key), _MAX_ID) for key in row if key not in read and says_something(row[key]))
    if row_format == "text":
        return _parse_text(row, row_id, where, unread)
    turns, first_trained = _TURNS[row_format](row, where)
    turns = [turn for turn in turns if turn is not None]
    system = row.get("system")
    if system not in (None, ""):
        if turns and turns[0][0]["role"] == "system":
            raise DataError(f"{where}: system: the turns begin with a system turn, too; keep one of them")
        turns.insert(
            0, ({"role": "system", "content": check_text(system, f"{where}: system")}, None, f"{where}: system")
        )
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
    if isinstance(kwargs, str):
        kwargs = decode_text(kwargs, f"{where}: chat_template_kwargs", "an object of template variables as JSON")
    if not isinstance(kwargs, dict) or not all(str(key).isidentifier() for key in kwargs):
        raise DataError(f"{where}: chat_template_kwargs: expected an object of template variables")
    tools = tuple(parse_tools(row["tools"], f"{where}: tools")) if row.get("tools") not in (None, "", []) else ()
    places = tuple(at.removeprefix(f"{where}: ") for *_, at in turns)
    return Conversation(row_id, messages, where, weights, tools, kwargs, places=places, unread=unread)


def rename_keys(row: dict[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with our keys. names: our key or role -> what the row, or a turn of it, calls it."""
    ours = {theirs: own for own, theirs in names.items()}

    def rename(value: dict[str, Any], *, deep: bool) -> dict[str, Any]:
        found = {}
        for key, inner in value.items():
            if deep and isinstance(inner, list):
                inner = [rename(each, deep=False) if isinstance(each, dict) else each for each in inner]
            name = ours.get(key, key)
            if name in ("role", "from") and isinstance(inner, str):
                inner = ours.get(inner, inner)
            if name in found:
                raise DataError(f"{where}: both '{name}' and '{key}', which --map says is the same; keep one")
            found[name] = inner
        return found

    return rename(row, deep=True)


_READ_BY = {"alpaca": ("input", "history"), "query": ("history",)}


def _tell_format(row: dict[str, Any], where: str) -> str:
    found = [name for name, keys in FORMATS.items() if keys[0] in row]
    if not found:
        keys = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: no 'conversations' or 'messages' in the row (its keys: {keys})")
    if found[:2] == ["conversations", "messages"]:
        raise DataError(f"{where}: both 'conversations' and 'messages' in one row; keep one, or say --data_format")
    return found[0]


def _parse_text(row: dict[str, Any], row_id: str, where: str, unread: tuple[str, ...]) -> Conversation:
    text = check_text(row["text"], f"{where}: text")
    if not text.strip():
        raise DataError(f"{where}: text: empty")
    for key in [key for key in sorted(_ROW_KEYS & row.keys()) if says_something(row[key])]:
        raise DataError(f"{where}: {key}: has no effect on plain text; remove it")
    return Conversation(row_id, (), where, text=text, unread=unread)


# ---- the formats' turns, and the index of the first that may be trained ----


def _conversation_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return list(parse_turns(row["conversations"], f"{where}: conversations", "from", "value")), 0


def _message_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return list(parse_turns(row["messages"], f"{where}: messages", "role", "content")), 0


def _alpaca_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    given = check_text(row.get("input") or "", f"{where}: input")
    question = check_text(row["instruction"], f"{where}: instruction")
    question = "\n".join(text for text in (question, given) if text)
    return _paired_turns(row, where, ("instruction", question), ("output", row["output"])), 0


def _query_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return _paired_turns(row, where, ("query", row["query"]), ("response", row["response"])), 0


def _paired_turns(row: dict[str, Any], where: str, question: tuple[str, Any], answer: tuple[str, Any]) -> list[Turn]:
    """The turns of `history`, a list of [question, answer], and of the last pair, given as (key, text)."""
    turns: list[Turn] = []
    history = row.get("history") or []
    if isinstance(history, str):  # tables hold it as text
        history = decode_text(history, f"{where}: history", "a list of [question, answer] as JSON")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: history: expected a list of [question, answer]")
    earlier = [
        [(f"history[{index}][{side}]", text) for side, text in enumerate(pair)] for index, pair in enumerate(history)
    ]
    for pair in [*earlier, [question, answer]]:
        for role, (key, text) in zip(("user", "assistant"), pair, strict=True):
            at = f"{where}: {key}"
            message = {"role": role, "content": check_text(text, at)}
            check_answer(message, at)
            turns.append((message, None, at))
    return turns


def _prompt_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    sides: list[list[Turn]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        at = f"{where}: {key}"
        if isinstance(row[key], str):
            message = {"role": role, "content": check_text(row[key], at)}
            check_answer(message, at)
            sides.append([(message, None, at)])
        else:
            sides.append(list(parse_turns(row[key], at, "role", "content")))
    return [*sides[0], *sides[1]], len(sides[0])


_TURNS = {
    "conversations": _conversation_turns,
    "messages": _message_turns,
    "alpaca": _alpaca_turns,
    "query": _query_turns,
    "prompt": _prompt_turns,
}


def _check_order(turns: list[Turn], where: str) -> None:
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
