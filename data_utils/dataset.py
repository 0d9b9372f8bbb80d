"""Tokenised rows and the account of where every conversation went."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_utils.schema import parse_record
from data_utils.sources import DataError, hash_file, read_records
from data_utils.template import IGNORE_INDEX, ChatTemplate, Row, cut_to_length


@dataclass
class Account:
    """What became of the input: every conversation is trained, or counted here with a reason and its place.

    files: [{"path", "sha256", "conversations"}].
    conversations: rows read. conversations_trained: those with at least one trained turn.
    rows: training rows (a template that rewrites history makes one row a turn). turns_trained: supervised turns.
    tokens, supervised_tokens: in all rows.
    dropped: reason -> places (`file:line`), one entry a conversation or turn.
    """

    files: list[dict[str, str | int]] = field(default_factory=list)
    conversations: int = 0
    conversations_trained: int = 0
    rows: int = 0
    turns_trained: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Count one conversation or turn that is not trained."""
        self.dropped.setdefault(reason, []).append(where)

    def describe(self) -> list[str]:
        """Lines for the log."""
        lines = [
            f"{self.conversations:,} conversations: {self.conversations_trained:,} trained, as {self.rows:,} rows with "
            f"{self.turns_trained:,} supervised turns; {self.tokens:,} tokens, {self.supervised_tokens:,} supervised"
        ]
        for reason, places in self.dropped.items():
            more = f" and {len(places) - 3:,} more" if len(places) > 3 else ""
            lines.append(f"not trained: {len(places):,} x {reason} ({', '.join(places[:3])}{more})")
        return lines


class TokenizedRows:
    """Rows in flat integer arrays, so that a million rows cost no million Python lists.

    Indexing gives (input_ids, labels) as lists of equal length; `lengths` holds every row's number of tokens;
    `ids` the identity of every row: the conversation's own id, or `<file stem>-<row number>`.
    """

    def __init__(self) -> None:
        self._input_ids = array("i")
        self._labels = array("i")
        self._starts = array("q", [0])
        self._num_targets = array("i")
        self.lengths = array("i")
        self.ids: list[str] = []
        self.largest_token_id = -1

    def append(self, row: Row, row_id: str) -> None:
        """Add one row."""
        self._input_ids.extend(row.input_ids)
        self._labels.extend(row.labels)
        self._starts.append(len(self._input_ids))
        self.lengths.append(len(row.input_ids))
        self._num_targets.append(row.num_supervised)
        self.ids.append(row_id)
        self.largest_token_id = max(self.largest_token_id, *row.input_ids)

    def num_targets(self, index: int) -> int:
        """Supervised tokens of a row."""
        return self._num_targets[index]

    def fingerprint(self) -> str:
        """Hash of every row's tokens and labels, in their order."""
        digest = hashlib.sha256()
        for values in (self._starts, self._input_ids, self._labels):
            digest.update(values)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        start, end = self._starts[index], self._starts[index + 1]
        return self._input_ids[start:end].tolist(), self._labels[start:end].tolist()


def load_rows(
    paths: Sequence[str | Path], template: ChatTemplate, *, max_length: int | None = None
) -> tuple[TokenizedRows, Account]:
    """Read, check and tokenise data files.

    max_length: tokens a row may have; longer rows lose whole turns from the end, None is no limit.

    Raises: DataError: bad input (see sources, schema, template), or no supervised token in all of it.
    """
    rows, account = TokenizedRows(), Account()
    for path in paths:
        before = account.conversations
        for record in read_records(path):
            conversation = parse_record(record)
            account.conversations += 1
            row_id = conversation.id if conversation.id is not None else f"{Path(path).stem}-{record.index}"
            kept = 0
            for number, row in enumerate(template.encode_conversation(conversation)):
                cut = row if max_length is None else cut_to_length(row, max_length)
                if lost := len(row.ends) - (len(cut.ends) if cut else 0):
                    first = cut is None and number == 0
                    reason = "first turn does not fit" if first else "later turn does not fit"
                    for _ in range(lost):  # one entry a turn
                        account.drop(f"{reason} in {max_length} tokens (--model_max_length)", conversation.where)
                if cut is not None:
                    kept += 1
                    _add_row(rows, account, cut, row_id)
            if not conversation.supervised_turns:
                account.drop("no assistant turn", conversation.where)
            account.conversations_trained += kept > 0
        account.files.append(
            {"path": str(path), "sha256": hash_file(path), "conversations": account.conversations - before}
        )
    if account.supervised_tokens == 0:
        reasons = "; ".join(account.describe()[1:]) or "no conversation was left"
        raise DataError(f"{', '.join(map(str, paths))}: no supervised token in the whole set: {reasons}")
    return rows, account


def _add_row(rows: TokenizedRows, account: Account, row: Row, row_id: str) -> None:
    assert len(row.input_ids) == len(row.labels) and any(label != IGNORE_INDEX for label in row.labels)
    rows.append(row, row_id)
    account.rows += 1
    account.turns_trained += len(row.ends)
    account.tokens += len(row.input_ids)
    account.supervised_tokens += row.num_supervised
