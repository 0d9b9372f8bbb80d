"""A chunk of conversations to rows and their account: the work of one worker process."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from data_utils.conversations import DataOptions
from data_utils.render_cache import RowEncoder
from data_utils.report import Account, hash_conversation
from data_utils.rows import EncodedRow, cut_to_length, to_arrow
from data_utils.schema import Conversation
from data_utils.sources import DataError
from data_utils.template import EMPTY_THINKING, ChatTemplate

_HEAD = 16  # tokens of a target, in which an empty think block ends
TOO_LONG = "; --on_long drop_turns or drop goes on without them"


@dataclass
class EncodedChunk:
    """What became of a chunk of conversations.

    rows: None if nothing of it is trained. account: its counts and problems.
    hashes: (hash, `file:line`) of each conversation. lengths: tokens of each row before it was cut.
    dropped: a JSON line for each turn or conversation that is not trained.
    """

    rows: pa.RecordBatch | None = None
    account: Account = field(default_factory=Account)
    hashes: list[tuple[int, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def encode_chunk(conversations: Sequence[Conversation], encoder: RowEncoder, options: DataOptions) -> EncodedChunk:
    """Encode conversations, cut their rows to length, and count what is trained and what is dropped."""
    chunk = EncodedChunk()
    template = encoder.template
    kept: list[tuple[str, str, int, EncodedRow]] = []
    for conversation in conversations:
        try:
            rows = encoder.encode(conversation)
        except DataError as error:
            chunk.account.refuse(str(error))
            continue
        texts = [(m["content"], m["role"]) for m in conversation.messages] or [(conversation.text or "", "text")]
        chunk.account.count_texts(conversation)
        if any(template.encoder.holds_control_text(text, role) for text, role in texts):
            chunk.account.control_texts += 1
            chunk.account.note("control_texts", conversation.where)
        number = hash_conversation(conversation)
        chunk.hashes.append((number, conversation.where))
        named = _cut_and_count(chunk, conversation, rows, template.stop_ids, options)
        if template.writes_empty_thinking and conversation.text is None:
            _count_thinking(chunk.account, [row for _, row in named], template)
        kept += [(row_id, conversation.where, number, row) for row_id, row in named]
    chunk.rows = to_arrow(kept) if kept else None
    return chunk


def _cut_and_count(
    chunk: EncodedChunk, conversation: Conversation, rows: list[EncodedRow], stop_ids: set[int], options: DataOptions
) -> list[tuple[str, EncodedRow]]:
    """Return (row id, row) of what is left of a conversation's rows."""
    account = chunk.account
    if not rows:
        has_answer = any(message["role"] == "assistant" for message in conversation.messages)
        _drop(chunk, conversation, "no supervised turn" if has_answer else "no assistant turn")
    for message in conversation.messages[max(conversation.supervised_turns, default=-1) + 1 :] if rows else ():
        _drop(chunk, conversation, f"{message['role']} turn after the last trained turn")
    # Rows by their number in the conversation: one that is dropped still counts.
    numbered: list[tuple[int, EncodedRow]] = []
    for number, row in enumerate(rows, start=1):
        for part_number, part in enumerate(_cut_row(chunk, conversation, row, options, is_first=number == 1), number):
            if part.num_supervised:
                numbered.append((part_number, part))
            else:  # nothing predicts the first token of a row
                _drop(chunk, conversation, "a row of one token, which has no target")
    account.conversations_trained += bool(numbered)
    account.split += len(numbered) > 1 and conversation.text is None
    account.rows += len(numbered)
    for _, row in numbered:
        account.turns_trained += len(row.ends)
        account.stopped += sum(int(row.input_ids[end - 1]) in stop_ids for end in row.ends)
        account.tokens += len(row.input_ids)
        account.supervised_tokens += row.num_supervised
        account.largest_token_id = max(account.largest_token_id, int(row.input_ids.max()))
    is_only = len(rows) == len(numbered) == 1
    return [(conversation.id if is_only else f"{conversation.id}#{number}", row) for number, row in numbered]


def _count_thinking(account: Account, rows: list[EncodedRow], template: ChatTemplate) -> None:
    """Count targets that begin with an empty think block, and those with reasoning."""
    for row in rows:
        for start, end, weight in row.spans:
            if not weight:
                continue
            head = template.tokenizer.decode(row.input_ids[start : min(end, start + _HEAD)].tolist())
            is_empty = EMPTY_THINKING.match(head) is not None
            account.empty_thinking += is_empty
            account.with_thinking += not is_empty and (template.opens_thinking or head.lstrip().startswith("<think>"))


def _cut_row(
    chunk: EncodedChunk, conversation: Conversation, row: EncodedRow, options: DataOptions, *, is_first: bool
) -> list[EncodedRow]:
    """Return the row as it fits in max_length tokens: nothing, one row, or the pieces of a plain text."""
    limit, length = options.max_length, len(row.input_ids)
    chunk.lengths.append(length)
    if limit is None or length <= limit:
        return [row]
    where = f"in {limit} tokens (--model_max_length)"
    if conversation.text is not None:
        return [_slice(row, start, min(start + limit, length)) for start in range(0, length, limit)]
    if options.on_long == "error":
        chunk.account.refuse(f"{conversation.where}: {length:,} tokens do not fit {where}{TOO_LONG}")
        return []
    if options.on_long == "drop":
        _drop(chunk, conversation, f"row does not fit {where}")
        return []
    short = cut_to_length(row, limit)
    which = "first" if short is None and is_first else "later"
    for _ in range(len(row.ends) - (len(short.ends) if short else 0)):
        _drop(chunk, conversation, f"{which} turn does not fit {where}")
    chunk.account.shortened += short is not None
    return [short] if short else []


def _slice(row: EncodedRow, start: int, end: int) -> EncodedRow:
    ends = [end - start] if end == len(row.input_ids) else []
    return EncodedRow(row.input_ids[start:end], [(0, end - start, 1.0)], ends)


def _drop(chunk: EncodedChunk, conversation: Conversation, reason: str) -> None:
    chunk.account.drop(reason, conversation.where)
    entry = {"id": conversation.id, "where": conversation.where, "reason": reason}
    chunk.dropped.append(json.dumps(entry, ensure_ascii=False) + "\n")
