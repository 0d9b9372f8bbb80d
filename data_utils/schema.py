"""Records to conversations: one shape for every input format, with errors that name file:line:field.

Formats so far: the original `conversations` (from / value) and `messages` (role / content).
"""

from dataclasses import dataclass
from typing import Any

from data_utils.sources import DataError, Record

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Conversation:
    """One conversation in the form chat templates take.

    id: the row's own `id`, or `<file stem>-<row number>` left to the caller when it has none (None here).
    messages: [{"role": "system" | "user" | "assistant", "content": str}, ...].
    where: `file:line`, for messages.
    """

    id: str | None
    messages: tuple[dict[str, str], ...]
    where: str

    @property
    def supervised_turns(self) -> list[int]:
        """Indices of the messages that are trained: every assistant turn."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def parse_record(record: Record) -> Conversation:
    """Check one record and turn it into a Conversation.

    Raises: DataError: names `file:line: field: what is wrong` and the way out.
    """
    row, where = record.value, record.where
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with 'conversations' or 'messages', not {_kind(row)}")
    present = [key for key in ("conversations", "messages") if key in row]
    if not present:
        keys = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: no 'conversations' or 'messages' in the row (its keys: {keys})")
    for key in ("tools", "functions", "system", "history", "chat_template_kwargs", "weight", "loss", "loss_weight"):
        if row.get(key) not in (None, "", []):
            raise DataError(f"{where}: {key}: not supported in a row; remove it, or write it as turns")
    if len(present) == 2:
        raise DataError(f"{where}: both 'conversations' and 'messages' in one row; keep one of them")
    field = present[0]
    role_key, content_key = ("from", "value") if field == "conversations" else ("role", "content")
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: {field}: expected a list of turns, found {_kind(turns)}")
    messages = [
        _parse_turn(turn, f"{where}: {field}[{index}]", role_key, content_key) for index, turn in enumerate(turns)
    ]
    for index, message in enumerate(messages[1:], start=1):
        if message["role"] == "system":
            raise DataError(f"{where}: {field}[{index}].{role_key}: a system turn can only be the first turn")
    first = 1 if messages[0]["role"] == "system" else 0
    if first < len(messages) and messages[first]["role"] == "assistant":
        raise DataError(
            f"{where}: {field}[{first}].{role_key}: a conversation cannot begin with the assistant; "
            "add the user turn it answers, or remove the turn"
        )
    row_id = row.get("id")
    return Conversation(None if row_id is None else str(row_id), tuple(messages), where)


def _parse_turn(turn: Any, where: str, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn must be an object with '{role_key}' and '{content_key}', not {_kind(turn)}")
    for key in (role_key, content_key):
        if key not in turn:
            raise DataError(f"{where}: no '{key}' in the turn")
    role, content = turn[role_key], turn[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}.{role_key}: {role!r} is not a role ({', '.join(ROLES)})")
    if not isinstance(content, str):
        raise DataError(f"{where}.{content_key}: expected text, found {_kind(content)}")
    # Keys such as `tool_calls` change what the turn says: ignoring them would train something else.
    unknown = sorted(turn.keys() - {role_key, content_key, "name", "id"})
    if unknown:
        raise DataError(f"{where}.{unknown[0]}: not supported in a turn; remove it or convert the row")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in content):
        raise DataError(f"{where}.{content_key}: holds half a surrogate pair (\\ud8xx), which is no character")
    role = ROLES[role]
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}.{content_key}: empty assistant turn; write the answer or remove the turn")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    if value == [] or value == {}:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
