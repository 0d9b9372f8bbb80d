"""Training rows: token ids and labels of one row, and many of them in a memory-mapped Arrow file."""

import copy
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_utils.sources import DataError

# What lays rows out in batches needs no pyarrow.
if TYPE_CHECKING:
    import pyarrow as pa

IGNORE_INDEX = -100
ROWS_FILE, DROPPED_FILE = "rows.arrow", "dropped.jsonl"


@functools.cache
def arrow_schema() -> "pa.Schema":
    """The columns of stored rows."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),  # file:line
            ("conversation", pa.int64()),  # hash: equal conversations are duplicates
            ("prompt_hash", pa.int64()),  # of the ids before the first supervised span
            ("answer_hash", pa.int64()),  # of the others
            ("input_ids", pa.list_(pa.int32())),
            ("starts", pa.list_(pa.int32())),  # of the supervised spans
            ("ends", pa.list_(pa.int32())),
            ("weights", pa.list_(pa.float32())),
            ("num_targets", pa.int32()),
        ]
    )


@dataclass
class Row:
    """One training row.

    input_ids, labels: same length, not shifted; labels are IGNORE_INDEX where nothing is trained.
    ends: for each supervised turn in the row, the index after its last token, ascending.
    weights: loss weight of each supervised turn.
    pieces: (index after the piece, why it is trained or not) for each piece of the row.
    """

    input_ids: list[int]
    labels: list[int]
    ends: list[int]
    weights: list[float] = field(default_factory=list)
    pieces: list[tuple[int, str]] = field(default_factory=list)

    @property
    def is_plain_text(self) -> bool:
        """Whether every token is trained."""
        return IGNORE_INDEX not in self.labels

    @property
    def num_supervised(self) -> int:
        """Supervised tokens. The first token of a row does not count: no position predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass
class EncodedRow:
    """A row in the form that is stored.

    input_ids: int32. spans: (start, end, loss weight) of each supervised span, ascending.
    ends: for each supervised turn, the index after its last token.
    """

    input_ids: NDArray[np.int32]
    spans: list[tuple[int, int, float]]
    ends: list[int]

    @property
    def num_supervised(self) -> int:
        """Supervised tokens, as in Row."""
        return sum(end - max(start, 1) for start, end, _ in self.spans)


def encode_row(row: Row) -> EncodedRow:
    """Convert a row to its stored form."""
    if len(row.pieces) == 2 * len(row.ends):  # a context and a target per turn
        edges = [(row.pieces[i][0], row.pieces[i + 1][0]) for i in range(0, len(row.pieces), 2)]
    else:
        supervised = np.concatenate([[False], np.array(row.labels) != IGNORE_INDEX, [False]])
        pairs = np.flatnonzero(supervised[1:] != supervised[:-1]).reshape(-1, 2)
        edges = [(int(start), int(end)) for start, end in pairs]
    # label_mask "qwen" supervises more spans than turns, all of weight 1.
    weights = row.weights if len(edges) == len(row.weights) else [1.0] * len(edges)
    spans = [(start, end, weight) for (start, end), weight in zip(edges, weights, strict=True)]
    return EncodedRow(np.array(row.input_ids, dtype=np.int32), spans, list(row.ends))


def cut_to_length(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """Drop turns from the end until the row has at most max_length tokens; None if the first turn does not fit."""
    ends = [end for end in row.ends if end <= max_length]
    if not ends:
        return None
    spans = [(start, min(end, ends[-1]), weight) for start, end, weight in row.spans if start < ends[-1]]
    return EncodedRow(row.input_ids[: ends[-1]], spans, ends)


def cut_row(row: Row, max_length: int) -> list[Row]:
    """A row as it is trained with at most max_length tokens: without turns from its end; plain text in pieces."""
    length = len(row.input_ids)
    if length <= max_length:
        return [row]
    if row.is_plain_text:
        starts = range(0, length, max_length)
        parts = [(start, min(start + max_length, length)) for start in starts if start + 1 < length]
    else:
        parts = [(0, max((end for end in row.ends if end <= max_length), default=0))]
    return [_cut_out(row, start, end) for start, end in parts if end]


def _cut_out(row: Row, start: int, end: int) -> Row:
    ends = [each - start for each in row.ends if start < each <= end]
    pieces = [(min(stop, end) - start, why) for stop, why in row.pieces if stop > start]
    pieces = pieces[: next((i for i, (stop, _) in enumerate(pieces, 1) if stop == end - start), len(pieces))]
    return Row(row.input_ids[start:end], row.labels[start:end], ends, row.weights[: len(ends)], pieces)


def to_arrow(rows: Sequence[tuple[str, str, int, EncodedRow]]) -> "pa.RecordBatch":
    """Convert (row id, `file:line`, hash of the conversation, row) to a record batch of arrow_schema."""
    import pyarrow as pa

    encoded = [row for *_, row in rows]
    hashes = [_hash_parts(row) for row in encoded]
    spans = [np.array(row.spans, dtype=np.float64).reshape(-1, 3) for row in encoded]
    id_offsets = np.cumsum([0, *(len(row.input_ids) for row in encoded)], dtype=np.int32)
    span_offsets = np.cumsum([0, *map(len, spans)], dtype=np.int32)
    input_ids = np.concatenate([row.input_ids for row in encoded] or [np.zeros(0, np.int32)])
    columns = np.concatenate(spans or [np.zeros((0, 3))])
    return pa.record_batch(
        [
            pa.array([row_id for row_id, *_ in rows], pa.string()),
            pa.array([source for _, source, *_ in rows], pa.string()),
            pa.array([number for _, _, number, _ in rows], pa.int64()),
            pa.array([prompt for prompt, _ in hashes], pa.int64()),
            pa.array([answer for _, answer in hashes], pa.int64()),
            pa.ListArray.from_arrays(id_offsets, pa.array(input_ids)),
            *(
                pa.ListArray.from_arrays(span_offsets, pa.array(columns[:, i].astype(kind)))
                for i, kind in enumerate((np.int32, np.int32, np.float32))
            ),
            pa.array([row.num_supervised for row in encoded], pa.int32()),
        ],
        schema=arrow_schema(),
    )


def _hash_parts(row: EncodedRow) -> tuple[int, int]:
    start = row.spans[0][0] if row.spans else len(row.input_ids)
    parts = (row.input_ids[:start], row.input_ids[start:])
    hashes = (hashlib.blake2b(part.tobytes(), digest_size=8).digest() for part in parts)
    prompt, answer = (int.from_bytes(each, "little", signed=True) for each in hashes)
    return prompt, answer


class TokenizedRows:
    """Rows in a memory-mapped Arrow file, so that a million rows take no memory.

    Indexing gives (input_ids int64, labels int64, weights float32 or None), each of shape [T].
    lengths, num_targets: tokens and supervised tokens of every row, int32 arrays. groups: row indices and weight of
    each file; None where every row is trained once an epoch.
    """

    directory: Path

    def __init__(self, table: "pa.Table"):
        import pyarrow as pa

        self._chosen: NDArray[np.int64] | None = None
        # Of each row its file, and of each file its weight.
        self._files: tuple[NDArray[np.int64], list[float]] | None = None
        batches = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=arrow_schema())]
        self._batches = [_Columns(batch) for batch in batches]
        self._first = np.cumsum([0, *(len(batch.num_targets) for batch in self._batches)])
        self.lengths = np.concatenate([np.diff(batch.id_offsets) for batch in self._batches])
        self.num_targets = np.concatenate([batch.num_targets for batch in self._batches])

    @classmethod
    def from_directory(cls, directory: Path) -> "TokenizedRows":
        """Open the rows that build_rows wrote. The list of dropped turns is in the same directory."""
        import pyarrow as pa

        with pa.memory_map(str(directory / ROWS_FILE)) as source:
            rows = cls(pa.ipc.open_file(source).read_all())
        rows.directory = directory
        return rows

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, Row]]) -> "TokenizedRows":
        """Hold (row id, row) in memory."""
        import pyarrow as pa

        encoded = [(row_id, "", 0, encode_row(row)) for row_id, row in rows]
        return cls(pa.Table.from_batches([to_arrow(encoded)]))

    def select(self, indices: NDArray[np.int64]) -> "TokenizedRows":
        """These rows alone, in this order; the files are the same."""
        chosen = copy.copy(self)
        chosen._chosen = indices if self._chosen is None else self._chosen[indices]
        chosen.lengths, chosen.num_targets = self.lengths[indices], self.num_targets[indices]
        if self._files is not None:
            chosen._files = (self._files[0][indices], self._files[1])
        return chosen

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Train rows as often as their files' weights say. weights: of each file, by its name in `file:line`."""
        numbers = {name: number for number, name in enumerate(weights)}
        sources = (source for batch in self._batches for source in batch.table["source"].to_pylist())
        files = np.array([numbers[source.rpartition(":")[0]] for source in sources], dtype=np.int64)
        self._files = (files if self._chosen is None else files[self._chosen], list(weights.values()))

    @property
    def groups(self) -> list[tuple[list[int], float]] | None:
        """See TokenizedRows."""
        if self._files is None:
            return None
        files, weights = self._files
        return [(np.flatnonzero(files == number).tolist(), weight) for number, weight in enumerate(weights)]

    def split(self, share: float, seed: int) -> "tuple[TokenizedRows, TokenizedRows]":
        """The rows without, and with, a share of the conversations; equal conversations are on the same side.

        Which ones is decided by the conversations and the seed alone, not by their order.

        Raises: DataError: fewer than two different conversations.
        """
        hashes = self.conversations()
        different = np.unique(hashes)
        if len(different) < 2:
            raise DataError(f"--eval_share {share}: {len(different)} different conversations cannot be divided")
        keys = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in different.tolist()]
        count = min(max(1, round(share * len(different))), len(different) - 1)
        held_back = different[sorted(range(len(keys)), key=keys.__getitem__)[:count]]
        is_held_back = np.isin(hashes, held_back)
        return self.select(np.flatnonzero(~is_held_back)), self.select(np.flatnonzero(is_held_back))

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
        """Return a row's id: the conversation's own id or `<file stem>-<row number>`, with `#2` for its second row."""
        batch, position = self._find(index)
        return batch.ids[position].as_py()

    def conversations(self) -> NDArray[np.int64]:
        """Return the hash of every row's conversation."""
        hashes = np.concatenate([batch.conversations for batch in self._batches])
        return hashes if self._chosen is None else hashes[self._chosen]

    def describe(self, indices: NDArray[np.int64]) -> dict[str, Any]:
        """Columns of these rows: row_id, source (`file:line`), tokens (supervised ones), prompt_hash, answer_hash.

        Rows of equal prompt_hash have one prompt; of equal answer_hash what follows is equal, too.
        """
        import pyarrow as pa

        chosen = indices if self._chosen is None else self._chosen[indices]
        taken = pa.array(chosen)
        names = {"row_id": "id", "source": "source", "prompt_hash": "prompt_hash", "answer_hash": "answer_hash"}
        columns = {
            own: pa.chunked_array([batch.table[name] for batch in self._batches]).take(taken)
            for own, name in names.items()
        }
        return {**columns, "tokens": pa.array(self.num_targets[indices], pa.int32())}

    def _find(self, index: int) -> "tuple[_Columns, int]":
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = index if self._chosen is None else int(self._chosen[index])
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._batches[number], index - int(self._first[number])


class _Columns:
    """One record batch as numpy views."""

    def __init__(self, batch: "pa.RecordBatch"):
        self.table = batch
        self.ids = batch["id"]
        self.conversations = _as_numpy(batch["conversation"])
        self.num_targets = _as_numpy(batch["num_targets"])
        self.id_offsets = _as_numpy(batch["input_ids"].offsets)
        self.input_ids = _as_numpy(batch["input_ids"].values)
        self.span_offsets = _as_numpy(batch["starts"].offsets)
        self.starts, self.ends, self.weights = (_as_numpy(batch[name].values) for name in ("starts", "ends", "weights"))


def _as_numpy(array: "pa.Array") -> NDArray[Any]:
    return np.from_dlpack(array)  # to_numpy() imports pandas first, a third of a second
