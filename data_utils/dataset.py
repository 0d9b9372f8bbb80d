"""Tokenised rows: built once, kept in Arrow files, read through a memory map."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_utils.bpe import Differs
from data_utils.cache import RowCache
from data_utils.fast import Batch, EncodedRow, FastEncoder, cut_to_length, encode_row
from data_utils.report import Account, DataErrors, Statistics
from data_utils.schema import Conversation, parse_record
from data_utils.sources import DataError, Source, find_sources, hash_file, read_records
from data_utils.template import IGNORE_INDEX, ChatTemplate, Row

ROWS_FILE, DROPPED_FILE = "rows.arrow", "dropped.jsonl"
_CHUNK, _WAITING = 1024, 10  # conversations in a batch, and batches on their way
_POOL_FROM = 1000  # stretches of text, below which other processes cost more than they save
_TOO_LONG = "; --on_long drop_turns or drop goes on without them"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("conversation", pa.int64()),  # hash: equal ones are duplicates
        ("input_ids", pa.list_(pa.int32())),
        ("starts", pa.list_(pa.int32())),  # of the trained stretches
        ("ends", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("num_targets", pa.int32()),
    ]
)


@dataclass(frozen=True)
class DataOptions:
    """How data files become rows.

    max_length: tokens a row may have. on_long: what a longer one does: "drop_turns" from its end, "drop", or "error".
    data_format: a key of schema.FORMATS; None tells it by the row. supervise: "all" assistant turns or the "last".
    on_bad_row: "error" (all of them, when the files have been read) or "skip". seed: of samples (`file#N`).
    """

    max_length: int | None = None
    on_long: str = "drop_turns"
    data_format: str | None = None
    supervise: str = "all"
    on_bad_row: str = "error"
    seed: int = 0


class TokenizedRows:
    """Rows in a memory-mapped Arrow file, so that a million of them cost no memory.

    Indexing gives (input_ids int64, labels int64, weights float32 or None) of equal length; `lengths` holds every
    row's number of tokens, `num_targets` its supervised ones.
    """

    directory: Path

    def __init__(self, table: pa.Table):
        batches = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=_SCHEMA)]
        self._batches = [_Columns(batch) for batch in batches]
        self._first = np.cumsum([0, *(len(batch.num_targets) for batch in self._batches)])
        self.lengths = np.concatenate([np.diff(batch.id_offsets) for batch in self._batches])
        self.num_targets = np.concatenate([batch.num_targets for batch in self._batches])

    @classmethod
    def from_directory(cls, directory: Path) -> "TokenizedRows":
        """Rows that build_rows wrote; beside them lies the list of what was dropped."""
        with pa.memory_map(str(directory / ROWS_FILE)) as source:
            rows = cls(pa.ipc.open_file(source).read_all())
        rows.directory = directory
        return rows

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, Row]]) -> "TokenizedRows":
        """Rows in memory."""
        encoded = [(row_id, 0, encode_row(row)) for row_id, row in rows]
        return cls(pa.Table.from_batches([_to_arrow(encoded)]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32] | None]:
        batch, position = self._find(index)
        start, end = batch.id_offsets[position : position + 2]
        input_ids = batch.input_ids[start:end].astype(np.int64)
        labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
        first, last = batch.span_offsets[position : position + 2]
        spans = slice(first, last)
        weights = None
        if np.any(batch.weights[spans] != 1):
            weights = np.ones(len(input_ids), dtype=np.float32)
        for begin, stop, weight in zip(batch.starts[spans], batch.ends[spans], batch.weights[spans], strict=True):
            labels[begin:stop] = input_ids[begin:stop]
            if weights is not None:
                weights[begin:stop] = weight
        return input_ids, labels, weights

    def row_id(self, index: int) -> str:
        """Identity of a row: the conversation's own id or `<file stem>-<row number>`, `#2` for its second row."""
        batch, position = self._find(index)
        return batch.ids[position].as_py()

    def conversations(self) -> NDArray[np.int64]:
        """A hash of every row's conversation."""
        return np.concatenate([batch.conversations for batch in self._batches])

    def _find(self, index: int) -> "tuple[_Columns, int]":
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._batches[number], index - int(self._first[number])


class _Columns:
    """One record batch as numpy views."""

    def __init__(self, batch: pa.RecordBatch):
        self.ids = batch["id"]
        self.conversations = batch["conversation"].to_numpy()
        self.num_targets = batch["num_targets"].to_numpy()
        self.id_offsets = batch["input_ids"].offsets.to_numpy()
        self.input_ids = batch["input_ids"].values.to_numpy()
        self.span_offsets = batch["starts"].offsets.to_numpy()
        self.starts, self.ends, self.weights = (batch[name].values.to_numpy() for name in ("starts", "ends", "weights"))


def load_rows(
    paths: Sequence[str | Path],
    template: ChatTemplate,
    options: DataOptions | None = None,
    *,
    cache: RowCache | None = None,
) -> tuple[TokenizedRows, Account]:
    """Read, check and tokenise data files, or take what was tokenised before of the same bytes in the same way.

    Several processes may call this at once: one builds, the others wait for its lock, outside any collective.

    Raises: DataError: bad input (see sources, schema, template), or no supervised token in all of it.
    """
    options = options or DataOptions()
    cache = cache or RowCache(None)
    sources = find_sources(paths)
    hashes = [hash_file(source.path) for source in sources]
    key = [[str(source), digest] for source, digest in zip(sources, hashes, strict=True)]
    matters = vars(options) | ({} if any(source.sample for source in sources) else {"seed": None})
    with cache.entry(key, template, matters) as entry:
        if not entry.complete:
            account = build_rows(sources, template, options, entry.directory)
            for file, digest in zip(account.files, hashes, strict=True):
                file["sha256"] = digest
            entry.seal(account.to_json())
        account = Account(**entry.read())
        rows = TokenizedRows.from_directory(entry.directory)
    return rows, account


def build_rows(
    sources: Sequence[Source],
    template: ChatTemplate,
    options: DataOptions,
    directory: Path,
    *,
    may_be_empty: bool = False,
) -> Account:
    """Tokenise files into a directory: rows, and the list of what was dropped.

    Raises: DataError: all bad rows at once (unless options skip them), or no supervised token in all.
    """
    try:
        try:
            account = _build_rows(sources, template, options, directory)
        except Differs:
            template.encoder.can_be_fast = False
            account = _build_rows(sources, template, options, directory)
    except OSError as error:
        raise DataError(f"{directory}: cannot write tokenised rows: {error.strerror or error}; make room") from None
    problems = [each for each in account.problems if options.on_bad_row == "error" or each.endswith(_TOO_LONG)]
    if problems and not may_be_empty:
        raise DataErrors(problems)
    if account.supervised_tokens == 0 and not may_be_empty:
        reasons = "; ".join(account.describe()[1:]) or "no conversation was left"
        raise DataError(f"{', '.join(map(str, sources))}: no supervised token in the whole set: {reasons}")
    return account


def _build_rows(sources: Sequence[Source], template: ChatTemplate, options: DataOptions, directory: Path) -> Account:
    account = Account()
    statistics = Statistics(account)
    encoder, digest = FastEncoder(template), hashlib.sha256()
    with (
        open(directory / DROPPED_FILE, "w", encoding="utf-8") as dropped,
        pa.OSFile(str(directory / ROWS_FILE), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        keeper = _Keeper(template, options, account, statistics, dropped)
        for batch, encoded in _encode(sources, options, encoder, account):
            rows = keeper.keep(batch, encoder.finish(batch, encoded))
            if rows:
                arrow = _to_arrow(rows)
                writer.write_batch(arrow)
                for name in ("input_ids", "starts", "ends", "weights"):
                    digest.update(arrow[name].offsets.buffers()[1])
                    digest.update(arrow[name].values.buffers()[1])
    account.fingerprint = digest.hexdigest()
    statistics.finish(options.max_length)
    return account


def _encode(
    sources: Sequence[Source], options: DataOptions, encoder: FastEncoder, account: Account
) -> Iterator[tuple[Batch, list[NDArray[np.int32]]]]:
    """Read and render here while what was rendered before is encoded beside."""
    conversations = itertools.chain.from_iterable(read_conversations(source, options, account) for source in sources)
    batch = encoder.prepare(list(itertools.islice(conversations, _CHUNK)))
    if len(batch.stretches) < _POOL_FROM:
        yield batch, encoder.encode(batch)
        batch = encoder.prepare(list(itertools.islice(conversations, _CHUNK)))
        if not batch.conversations:
            return
    waiting: list[tuple[Batch, Future[Any]]] = []
    with encoder.open_pool() as pool:
        while batch.conversations:
            waiting.append((batch, encoder.encode_in_pool(pool, batch)))
            if len(waiting) > _WAITING:
                done, future = waiting.pop(0)
                yield done, encoder.collect(future)
            batch = encoder.prepare(list(itertools.islice(conversations, _CHUNK)))
        for done, future in waiting:
            yield done, encoder.collect(future)


def read_conversations(source: Source, options: DataOptions, account: Account) -> Iterator[Conversation]:
    """The conversations of a file; what cannot be read is noted in the account, and the file, when it ends."""
    before = account.conversations
    for record in read_records(source, seed=options.seed):
        try:
            if isinstance(record, DataError):
                raise record
            account.conversations += 1
            yield parse_record(record, name=source.name, data_format=options.data_format, supervise=options.supervise)
        except DataError as error:
            account.problems.append(str(error))
    account.files.append({"path": str(source), "sha256": "", "conversations": account.conversations - before})


class _Keeper:
    """Cuts rows to length, counts them and what is dropped."""

    def __init__(
        self, template: ChatTemplate, options: DataOptions, account: Account, statistics: Statistics, dropped: Any
    ):
        self._template = template
        self._options = options
        self._account = account
        self._statistics = statistics
        self._dropped = dropped

    def keep(self, batch: Batch, encoded: list[list[EncodedRow] | DataError]) -> list[tuple[str, int, EncodedRow]]:
        """(id, hash of the conversation, row) of everything that is trained."""
        kept = []
        for conversation, rows in zip(batch.conversations, encoded, strict=True):
            if isinstance(rows, DataError):
                self._account.problems.append(str(rows))
                continue
            texts = [m["content"] for m in conversation.messages] or [conversation.text or ""]
            holds_control_text = any(map(self._template.encoder.holds_control_text, texts))
            number = self._statistics.add_conversation(conversation, holds_control_text=holds_control_text)
            kept += [(row_id, number, row) for row_id, row in self._keep_one(conversation, rows)]
        return kept

    def _keep_one(self, conversation: Conversation, rows: list[EncodedRow]) -> list[tuple[str, EncodedRow]]:
        account = self._account
        parts = [self._shorten(conversation, row, is_first=row is rows[0]) for row in rows]
        kept = [row for part in parts for row in part]
        if not rows:
            has_answer = any(message["role"] == "assistant" for message in conversation.messages)
            self._drop(conversation, "no supervised turn" if has_answer else "no assistant turn")
        account.conversations_trained += bool(kept)
        account.split += len(kept) > 1 and conversation.text is None
        account.rows += len(kept)
        stops = self._template.stop_ids
        for row in kept:
            account.turns_trained += len(row.ends)
            account.stopped += sum(int(row.input_ids[end - 1]) in stops for end in row.ends)
            account.tokens += len(row.input_ids)
            account.supervised_tokens += _count_targets(row)
            account.largest_token_id = max(account.largest_token_id, int(row.input_ids.max()))
        numbered = enumerate(parts[0] if conversation.text is not None else map(_only, parts), start=1)
        alone = len(rows) == 1 and len(kept) == 1
        return [(conversation.id if alone else f"{conversation.id}#{n}", row) for n, row in numbered if row is not None]

    def _shorten(self, conversation: Conversation, row: EncodedRow, *, is_first: bool) -> list[EncodedRow]:
        limit, length = self._options.max_length, len(row.input_ids)
        self._statistics.add_length(length)
        if limit is None or length <= limit:
            return [row]
        where = f"in {limit} tokens (--model_max_length)"
        if conversation.text is not None:
            return [_slice(row, start, min(start + limit, length), length) for start in range(0, length, limit)]
        if self._options.on_long == "error":
            self._account.problems.append(f"{conversation.where}: {length:,} tokens do not fit {where}{_TOO_LONG}")
            return []
        if self._options.on_long == "drop":
            self._drop(conversation, f"row does not fit {where}")
            return []
        short = cut_to_length(row, limit)
        first_lost = short is None and is_first
        for _ in range(len(row.ends) - (len(short.ends) if short else 0)):  # one entry a turn
            self._drop(conversation, f"{'first' if first_lost else 'later'} turn does not fit {where}")
        self._account.shortened += short is not None
        return [short] if short else []

    def _drop(self, conversation: Conversation, reason: str) -> None:
        self._account.drop(reason, conversation.where)
        entry = {"id": conversation.id, "where": conversation.where, "reason": reason}
        self._dropped.write(json.dumps(entry, ensure_ascii=False) + "\n")


def count_overlap(rows: TokenizedRows, others: TokenizedRows) -> int:
    """Conversations that are in both, by their hashes."""
    return len(np.intersect1d(rows.conversations(), others.conversations()))


def _only(part: list[EncodedRow]) -> EncodedRow | None:
    return part[0] if part else None


def _slice(row: EncodedRow, start: int, end: int, length: int) -> EncodedRow:
    return EncodedRow(row.input_ids[start:end], [(0, end - start, 1.0)], [end - start] if end == length else [])


def _count_targets(row: EncodedRow) -> int:
    """Supervised tokens that some position predicts: the first token of a row is predicted by none."""
    return sum(end - max(start, 1) for start, end, _ in row.spans)


def _to_arrow(rows: list[tuple[str, int, EncodedRow]]) -> pa.RecordBatch:
    ids = [row_id for row_id, _, _ in rows]
    encoded = [row for _, _, row in rows]
    spans = [np.array(row.spans, dtype=np.float64).reshape(-1, 3) for row in encoded]
    id_offsets = np.cumsum([0, *(len(row.input_ids) for row in encoded)], dtype=np.int32)
    span_offsets = np.cumsum([0, *map(len, spans)], dtype=np.int32)
    input_ids = np.concatenate([row.input_ids for row in encoded] or [np.zeros(0, np.int32)])
    columns = np.concatenate(spans or [np.zeros((0, 3))])
    return pa.record_batch(
        [
            pa.array(ids, pa.string()),
            pa.array([number for _, number, _ in rows], pa.int64()),
            pa.ListArray.from_arrays(id_offsets, pa.array(input_ids)),
            *(
                pa.ListArray.from_arrays(span_offsets, pa.array(columns[:, i].astype(kind)))
                for i, kind in enumerate((np.int32, np.int32, np.float32))
            ),
            pa.array([_count_targets(row) for row in encoded], pa.int32()),
        ],
        schema=_SCHEMA,
    )
