"""Records to conversations: one shape for every format, with errors that name file:line:field.

conversations  [{"from", "value"}, ...]           the original format; ShareGPT's roles
messages       [{"role", "content"}, ...]         OpenAI's, with tool_calls and reasoning_content
alpaca         instruction, input, output, history
prompt         prompt, completion                 text, or lists of messages
text           text                               no conversation: every token is trained
"""

from dataclasses import dataclass, field
from typing import Any

from data_utils.sources import DataError, Record
from data_utils.turns import Turn, check_answer, check_text, describe_kind, parse_tools, parse_turns

# A row's format is told by the first of these keys.
FORMATS = {
    "conversations": ("conversations",),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
_ROW_KEYS = {"tools", "system", "chat_template_kwargs"}


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
        raise DataError(
            f"{where}: a row must be an object with 'conversations' or 'messages', not {describe_kind(row)}"
        )
    row_format = data_format or _tell_format(row, where)
    if missing := [key for key in FORMATS[row_format] if key not in row]:
        raise DataError(f"{where}: no '{missing[0]}' in the row, which {row_format} rows have")
    for key in ("functions", "weight", "loss", "loss_weight"):
        if row.get(key) not in (None, "", []):
            raise DataError(f"{where}: {key}: not supported in a row; " + _INSTEAD.get(key, "write it into the turns"))
    row_id = f"{name}-{record.index}" if row.get("id") is None else check_text(str(row["id"]), f"{where}: id")
    if row_format == "text":
        return _parse_text(row, row_id, where)
    turns, first_trained = _TURNS[row_format](row, where)
    turns = [turn for turn in turns if turn is not None]
    system = row.get("system")
    if system not in (None, ""):
        if turns and turns[0][0]["role"] == "system":
            raise DataError(f"{where}: system: the turns begin with a system turn, too; keep one of them")
        turns.insert(0, ({"role": "system", "content": check_text(system, f"{where}: system")}, None, "system"))
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
    tools = tuple(parse_tools(row["tools"], f"{where}: tools")) if row.get("tools") not in (None, "", []) else ()
    return Conversation(row_id, messages, where, weights, tools, kwargs)


_INSTEAD = {"functions": "call it 'tools'"}


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
    text = check_text(row["text"], f"{where}: text")
    if not text.strip():
        raise DataError(f"{where}: text: empty")
    for key in _ROW_KEYS & row.keys():
        raise DataError(f"{where}: {key}: has no effect on plain text; remove it")
    return Conversation(row_id, (), where, text=text)


# ---- the formats' turns, and the index of the first that may be trained ----


def _conversation_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return list(parse_turns(row["conversations"], f"{where}: conversations", "from", "value")), 0


def _message_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    return list(parse_turns(row["messages"], f"{where}: messages", "role", "content")), 0


def _alpaca_turns(row: dict[str, Any], where: str) -> tuple[list[Any], int]:
    turns: list[Turn] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: history: expected a list of [question, answer]")
    texts = [check_text(row[key], f"{where}: {key}") for key in ("instruction", "output")]
    given = check_text(row.get("input") or "", f"{where}: input")
    question = "\n".join(text for text in (texts[0], given) if text)
    for index, (asked, answered) in enumerate([*history, [question, texts[1]]]):
        for number, (role, text) in enumerate((("user", asked), ("assistant", answered))):
            last = index == len(history)
            at = f"{where}: {('instruction', 'output')[number] if last else f'history[{index}][{number}]'}"
            message = {"role": role, "content": check_text(text, at)}
            check_answer(message, at)
            turns.append((message, None, at))
    return turns, 0


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
