"""The account of a data set: where every conversation went, and what there is to know before training on it."""

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_utils.schema import Conversation
from data_utils.sources import DataError, as_line

_SUMMED = (
    "conversations", "conversations_trained", "rows", "split", "shortened", "turns", "turns_trained", "stopped",
    "tokens", "supervised_tokens", "control_texts", "placeholders", "empty_thinking", "with_thinking", "num_problems",
)  # fmt: skip
_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(:\d+)?: ")  # file:line: or file:line:column:
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_]\w*\s*\}\}")
SHOWN = 3  # places that are named; the rest is counted
_KEPT = 100  # problems, and names of keys, that are written into files


class DataErrors(DataError):
    """Several mistakes: a line for each cause."""

    def __init__(self, messages: Sequence[str], *, limit: int = 100):
        self.messages = list(messages)
        lines = group_problems(messages)
        more = [f"and {len(lines) - limit:,} more"] if len(lines) > limit else []
        ValueError.__init__(self, "\n".join([*lines[:limit], *more]))


def group_problems(messages: Sequence[str]) -> list[str]:
    """A line for each cause in a file: the first message, how many rows have it, and in which lines the next are."""
    groups: dict[tuple[str, str], list[str]] = {}
    firsts: dict[tuple[str, str], str] = {}
    for message in messages:
        place = _PLACE.match(message)
        # Indices, lengths and quoted passages differ from row to row, the cause does not.
        cause = re.sub(r"'[^']{20,}'|\d+(,\d+)*", "#", message[place.end() :] if place else message)
        key = (place["file"] if place else "", cause)
        firsts.setdefault(key, message)
        groups.setdefault(key, []).append(place["line"] if place else "")
    lines = []
    for key, found in groups.items():
        others = [line for line in found[1 : SHOWN + 1] if line]
        more = f" and {len(found) - 1 - len(others):,} more" if len(found) - 1 > len(others) else ""
        word = "line" if len(others) == 1 else "lines"
        also = f" ({len(found):,} rows: also in {word} {', '.join(others)}{more})" if others else ""
        lines.append(firsts[key] + also)
    return lines


@dataclass
class Account:
    """What became of the input. Every row read is trained, or counted with a reason and its place (`file:line`).

    files: [{"path", "sha256", "conversations"}], with "weight" and "rows" where a file has a weight.
    fingerprint: hash of all tokens and what is trained of them.
    conversations: rows read. conversations_trained: those with at least one trained turn. rows: training rows.
    split: conversations that became several rows. shortened: those that lost turns at their end.
    dropped: reason -> how many turns or conversations; places: reason -> the first of them.
    problems: rows that could not be read (--on_bad_row skip), as messages; in JSON the first hundred of num_problems.
    unread: keys of rows that nothing reads -> in how many rows.
    characters: of text by role. lengths: tokens of a row before it was cut: median, 90 %, 99 %, longest.
    stopped: supervised turns that end with the stop token. duplicates: conversations equal to an earlier one.
    control_texts: conversations that hold the text of a control token (it stays text).
    empty_thinking, with_thinking: supervised turns that begin with an empty think block, and with reasoning, where the
        template writes such blocks. thinking_switch: its variable that moves empty ones into the prompt.
    placeholders: conversations that hold {{names}}, which whoever wrote them meant to fill in.
    """

    files: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""
    conversations: int = 0
    conversations_trained: int = 0
    rows: int = 0
    split: int = 0
    shortened: int = 0
    turns: int = 0
    turns_trained: int = 0
    stopped: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_row: int = 0
    largest_token_id: int = -1
    too_long: int = 0
    duplicates: int = 0
    control_texts: int = 0
    placeholders: int = 0
    empty_thinking: int = 0
    with_thinking: int = 0
    thinking_switch: str | None = None
    lengths: dict[str, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def refuse(self, problem: str) -> None:
        """Count one row that cannot be read or trained."""
        self.problems.append(problem)
        self.num_problems += 1

    def note(self, what: str, where: str) -> None:
        """Remember the first places of something."""
        places = self.places.setdefault(what, [])
        if len(places) < SHOWN:
            places.append(where)

    def drop(self, reason: str, where: str) -> None:
        """Count one conversation or turn that is not trained."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.note(reason, where)

    def count_texts(self, conversation: Conversation) -> None:
        """Count a conversation's turns and their characters by role, and the keys of its row that nothing reads."""
        for key in conversation.unread:
            key = key if key in self.unread or len(self.unread) < _KEPT else "(others)"
            self.unread[key] = self.unread.get(key, 0) + 1
        messages = _messages(conversation)
        self.turns += len(messages)
        for message in messages:
            role = message["role"]
            self.characters[role] = self.characters.get(role, 0) + len(message["content"] or "")
        if any("{{" in text and _PLACEHOLDER.search(text) for text in (m["content"] or "" for m in messages)):
            self.placeholders += 1
            self.note("placeholders", conversation.where)

    def add(self, other: "Account") -> None:
        """Add what was counted of the conversations that follow."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_token_id = max(self.largest_token_id, other.largest_token_id)
        for mine, theirs in (
            (self.characters, other.characters),
            (self.dropped, other.dropped),
            (self.unread, other.unread),
        ):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for what, places in other.places.items():
            for where in places:
                self.note(what, where)
        self.problems += other.problems

    def describe(self) -> list[str]:
        """Lines for the log."""
        turns = f"with {self.turns_trained:,} supervised turns"
        if self.rows or not self.conversations_trained:
            made = f"{self.conversations_trained:,} trained, as {self.rows:,} rows {turns}; {self.tokens:,} tokens, "
            made += f"{self.supervised_tokens:,} supervised"
        else:  # no tokenizer made rows of them
            made = f"{self.conversations_trained:,} {turns}"
        lines = [f"{self.conversations:,} conversations: {made}"]
        if any("weight" in file for file in self.files):
            parts = [(file["path"], file["rows"], file["weight"]) for file in self.files]
            named = ", ".join(f"{path} {count:,} x {weight:g}" for path, count, weight in parts)
            lines.append(f"an epoch has {sum(round(n * w) for _, n, w in parts):,} rows: {as_line(named, 500)}")
        if self.lengths:
            named = ", ".join(f"{name} {value:,}" for name, value in self.lengths.items())
            lines.append(f"tokens a row: {named}")
        for name, what in (
            ("split", "became several rows, since the template rewrites what was said before"),
            ("shortened", "lost turns at their end"),
            ("duplicates", "are exact duplicates of earlier ones"),
            ("control_texts", "hold texts that look like control tokens; they stay text"),
            ("placeholders", "hold {{placeholders}} that were not filled in"),
        ):
            if count := getattr(self, name):
                lines.append(f"{count:,} of them {what}{self._where(name, count)}")
        if self.empty_thinking:
            lines.append(self._describe_thinking())
        if self.unread:
            named = ", ".join(f"{key} ({count:,} rows)" for key, count in self.unread.items())
            lines.append(f"keys that are not read: {as_line(named, 500)}")
        if self.problems:
            lines.append(f"skipped: {self.num_problems:,} bad rows, the first: {self.problems[0]}")
        for reason, count in self.dropped.items():
            lines.append(f"not trained: {count:,} x {reason}{self._where(reason, count)}")
        return lines

    def _describe_thinking(self) -> str:
        mixed = f"; {self.with_thinking:,} others have reasoning" if self.with_thinking else ""
        ways = ["write reasoning_content into the data"]
        if self.thinking_switch:
            kwargs = f"--chat_template_kwargs '{{\"{self.thinking_switch}\": false}}'"
            ways.insert(0, f"{kwargs} (the block is then in the prompt, untrained, wherever the result is served)")
        return (
            f"{self.empty_thinking:,} of {self.turns_trained:,} targets begin with an empty think block, which teaches "
            f"the model not to think{mixed}; if that is not meant: {', or '.join(ways)}"
        )

    def describe_fully(self, max_length: int | None) -> list[str]:
        """Everything there is to know, for `check`."""
        total = max(1, sum(self.characters.values()))
        shares = ", ".join(f"{role} {100 * count / total:.0f} %" for role, count in self.characters.items())
        lines = [*self.describe()]
        lines.append(f"turns: {self.turns:,}, supervised {self.turns_trained:,}; text by role: {shares}")
        if max_length is not None:
            lines.append(f"rows longer than {max_length:,} tokens: {self.too_long:,}")
        if self.tokens:
            share = 100 * self.stopped / self.turns_trained
            lines.append(f"targets that end with the stop token: {share:.4g} %")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As JSON values of bounded size."""
        return {**asdict(self), "problems": self.problems[:_KEPT]}

    def _where(self, what: str, count: int) -> str:
        places = self.places.get(what, [])
        more = f" and {count - len(places):,} more" if count > len(places) else ""
        return f" ({', '.join(places)}{more})" if places else ""


class Statistics:
    """Completes an account with what takes all conversations to tell: duplicates, and the spread of lengths."""

    def __init__(self, account: Account):
        self._account = account
        self._seen: set[int] = set()
        self._lengths = array("i")

    def add(self, hashes: Sequence[tuple[int, str]], lengths: Sequence[int] = ()) -> None:
        """Add conversations as (hash, `file:line`), and their rows' lengths in tokens, before they are cut."""
        for number, where in hashes:
            if number in self._seen:
                self._account.duplicates += 1
                self._account.note("duplicates", where)
            self._seen.add(number)
        self._lengths.extend(lengths)

    def finish(self, max_length: int | None) -> None:
        """Write the lengths into the account. max_length: tokens, to count longer rows."""
        if self._lengths:
            ordered = sorted(self._lengths)
            at = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
            self._account.lengths = {name: ordered[round(q * (len(ordered) - 1))] for name, q in at.items()}
            self._account.longest_row = ordered[-1]
            if max_length is not None:
                self._account.too_long = sum(length > max_length for length in ordered)


def hash_conversation(conversation: Conversation) -> int:
    """Hash all that a conversation says (64 bits, signed)."""
    digest = hashlib.blake2b(digest_size=8)
    for message in _messages(conversation):
        said = f"{message.get('tool_calls', '')}{message.get('reasoning_content', '')}"
        digest.update(f"{message['role']}\0{message['content'] or ''}\0{said}".encode())
    digest.update(repr((conversation.tools, conversation.template_kwargs)).encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _messages(conversation: Conversation) -> Sequence[dict[str, Any]]:
    return conversation.messages or ({"role": "text", "content": conversation.text},)
