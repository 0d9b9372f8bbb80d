"""Data files to conversations, without a tokenizer. Standard library only."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_utils.hub_data import find_data
from data_utils.report import Account, DataErrors
from data_utils.schema import Conversation, parse_record
from data_utils.sources import DataError, Source, printable, read_records

_FIRST_ROWS = 200  # of each file, in which a mistake shows at once


@dataclass(frozen=True)
class DataOptions:
    """How data files become rows.

    max_length: most tokens of a row; None: no limit.
    on_long: what happens to a longer row: "drop_turns" from its end, "drop" the row, or "error".
    data_format: a key of schema.FORMATS; None tells it by the row's keys.
    supervise: "all" assistant turns or the "last".
    on_bad_row: "error" (all bad rows at once, when the files have been read) or "skip".
    seed: of samples (`file#N`).
    names: (our key, what the rows call it): ("role", "speaker").
    """

    max_length: int | None = None
    on_long: str = "drop_turns"
    data_format: str | None = None
    supervise: str = "all"
    on_bad_row: str = "error"
    seed: int = 0
    names: tuple[tuple[str, str], ...] = ()


def read_names(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What rows call our keys, from words such as role=speaker."""
    return tuple((own.strip(), theirs.strip()) for own, _, theirs in (pair.partition("=") for pair in pairs))


def read_conversations(source: Source, options: DataOptions, account: Account) -> Iterator[Conversation]:
    """Yield the conversations of a file. account gets what cannot be read, and the file when it ends."""
    before = account.conversations
    for record in read_records(source, seed=options.seed):
        try:
            if isinstance(record, DataError):
                raise record
            account.conversations += 1
            yield parse_record(
                record,
                name=source.name,
                data_format=options.data_format,
                supervise=options.supervise,
                names=dict(options.names),
            )
        except DataError as error:
            account.refuse(str(error))
    account.files.append(
        {"path": printable(str(source)), "sha256": "", "conversations": account.conversations - before}
    )


def check_first_rows(paths: Sequence[str], options: DataOptions) -> None:
    """Read the beginning of each file, and all files if a mistake is there, before any library is loaded.

    Raises: DataErrors: all rows that cannot be read.
    """
    if options.on_bad_row == "skip":
        return
    sources = find_data(paths, weighted=True)
    for source in sources:
        account = Account()
        rows = read_conversations(dataclasses.replace(source, sample=None), options, account)
        for _ in zip(range(_FIRST_ROWS), rows, strict=False):
            if account.problems:
                break
        if account.problems:
            whole = Account()
            for each in sources:
                for _ in read_conversations(each, options, whole):
                    pass
            raise DataErrors(whole.problems)
