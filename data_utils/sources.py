"""Files to records: every record knows its file and line.

Standard library only (pyarrow inside the readers of .parquet and .zst), so that a data file can be read without torch
or transformers. A mistake that does not end the file is yielded in its place, so that one pass finds them all.
"""

import csv
import gzip
import hashlib
import json
import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

FORMATS = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv", ".tsv")
_WEIGHT = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")
_MOST_OFTEN = 1000
_BOM = b"\xef\xbb\xbf"
_MESSAGE_CHARACTERS = 2000
csv.field_size_limit(2**31 - 1)  # of a cell; Python's own limit is 128 KiB
# Control characters, what turns the direction of writing, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class DataError(ValueError):
    """A mistake in the user's data, in one line of bounded length: what, where (file:line:field) and the way out."""

    def __init__(self, message: str):
        super().__init__(as_line(message, _MESSAGE_CHARACTERS))


@dataclass(frozen=True)
class Record:
    """One row of a data file. `where` is `file:line`, for messages; `index` counts rows from 0."""

    value: Any
    where: str
    index: int


@dataclass(frozen=True)
class Source:
    """One data file.

    sample: how many of its rows to take, or None for all. label: its name, where the path is none. weight: how often
    an epoch has its rows.
    """

    path: Path
    sample: int | None = None
    label: str | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The file's name without what says its format."""
        return self.path.name.partition(".")[0] if self.label is None else self.label.rpartition("/")[2]

    def __str__(self) -> str:
        name = self.label or str(self.path)
        return name if self.sample is None else f"{name}#{self.sample}"


def printable(text: str) -> str:
    """The text, with everything that a terminal would obey or could not show as an escape of JSON."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def as_line(text: str, limit: int) -> str:
    """The text as one printable line; what is longer than limit characters loses its middle."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
    return printable(text).replace("\n", "\\n")


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The data files behind `file`, `file#N` (a sample of N rows) and `directory/` (every data file below it).

    `*W` at the end of any of them is their weight: an epoch has each row W times, of 2.5 two or three times.

    Raises: DataError: nothing there, an unknown format, or a directory without a data file.
    """
    found = []
    for path in paths:
        try:
            name, weight = split_weight(str(path))
            found += [replace(source, weight=weight) for source in _find_sources(name)]
        except OSError as error:
            raise DataError(f"{str(path)[:100]}: cannot be read: {error.strerror}") from None
    return found


def read_records(source: Source, *, seed: int = 0) -> Iterator[Record | DataError]:
    """Yield the rows of a file, and a DataError in the place of each one that cannot be read.

    seed: of the sample, which keeps the file's order.

    Raises: DataError: a sample of more rows than there are.
    """
    rows = _read_rows(source.path)
    if source.label is not None:
        rows = _relabel(rows, str(source.path), source.label)
    if source.sample is None:
        yield from rows
        return
    chance, seen = random.Random(f"{seed}/{source.label or source.path.name}"), 0
    kept: list[Record] = []
    for row in rows:
        if isinstance(row, DataError):
            yield row
            continue
        seen += 1
        if len(kept) < source.sample:
            kept.append(row)
        elif (place := chance.randrange(seen)) < source.sample:
            kept[place] = row
    if seen < source.sample:
        raise DataError(f"{source}: the file has only {seen:,} rows; name it without #{source.sample}")
    yield from sorted(kept, key=lambda record: record.index)


def _relabel(rows: Iterator[Record | DataError], path: str, label: str) -> Iterator[Record | DataError]:
    """Rows with a label in place of the file's path, also in what is wrong with them."""
    path = printable(path)
    for row in rows:
        if isinstance(row, DataError):
            yield DataError(str(row).replace(path, label, 1))
        else:
            yield Record(row.value, row.where.replace(path, label, 1), row.index)


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file that are not blank.

    Raises: DataError: no such file, not UTF-8, nothing in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from None
    if not (lines := [line.strip("\r") for line in lines if line.strip()]):
        raise DataError(f"{path}: no lines in it; expected a prompt a line")
    return lines


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_weight(text: str) -> tuple[str, float]:
    """A path and its weight. Raises: DataError: a weight that is none.

    Example: "a.json#100*2.5" -> ("a.json#100", 2.5)
    """
    name, mark, number = text.rpartition("*")
    if not mark or Path(text).exists():
        return text, 1.0
    if not _WEIGHT.fullmatch(number) or not 0 < float(number) <= _MOST_OFTEN:
        raise DataError(f"{text}: after * stands how often an epoch has the rows, such as {name}*2.5, to {_MOST_OFTEN}")
    return name, float(number)


def _find_sources(text: str) -> list[Source]:
    path, sample = Path(text), None
    name, mark, number = text.rpartition("#")
    if mark and not path.exists():
        if not number.isascii() or not number.isdigit() or len(number) > 12 or int(number) < 1:
            raise DataError(f"{text}: after # stands how many rows to take, such as {name}#5000")
        path, sample = Path(name), int(number)
    if path.is_dir():
        if sample is not None:
            raise DataError(f"{text}: a sample is taken from a file, not from a directory")
        found = [file for file in sorted(path.rglob("*")) if _is_data_file(file, path)]
        if not found:
            raise DataError(f"{text}: no data file in this directory ({', '.join(FORMATS)})")
        return [Source(file) for file in found]
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a .json or .jsonl file")
    if _format_of(path) is None:
        raise DataError(f"{path}: unknown format '{path.suffix}'; expected {', '.join(FORMATS)}")
    return [Source(path, sample)]


def _is_data_file(file: Path, directory: Path) -> bool:
    # Hidden files are copies of other tools: .ipynb_checkpoints/, ._rows.json
    hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
    return not hidden and file.is_file() and _format_of(file) is not None


def _format_of(path: Path) -> str | None:
    return next((suffix for suffix in FORMATS if path.name.endswith(suffix)), None)


def _read_rows(path: Path) -> Iterator[Record | DataError]:
    readers = {".json": _read_json, ".parquet": _read_parquet, ".csv": _read_table, ".tsv": _read_table}
    found = False
    try:
        for item in readers.get(_format_of(path) or "", _read_jsonl)(path):
            found = True
            yield item
    except DataError as error:  # the rest of the file cannot be read
        found = True
        yield error
    except OSError as error:
        found = True
        yield DataError(f"{path}: cannot be read: {error.strerror or error}")
    if not found:
        yield DataError(f"{path}: no rows in it; expected at least one conversation")


# ---- one list ----


def _read_json(path: Path) -> Iterator[Record | DataError]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    # json.loads knows no line of an element, so the list is walked here and its elements are parsed one by one.
    position = _skip_space(text, 0)
    if position == len(text):
        raise DataError(f"{path}: empty file; expected a JSON list of conversations")
    if text[position] != "[":
        _parse_at(path, text, position)
        way_out = "put the row in [ ]" if text[position] == "{" else "expected [{...}, ...]"
        raise DataError(f"{path}:1: not a JSON list; {way_out}, or name a file with one row a line .jsonl")
    position = _skip_space(text, position + 1)
    line, counted, index = 1, 0, 0
    while text[position : position + 1] != "]" or index > 0:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _parse_at(path, text, position)
        yield _record(value, path, line, index)
        index += 1
        position = _skip_space(text, position)
        delimiter = text[position : position + 1]
        if delimiter not in (",", "]") or not delimiter:
            raise _syntax_error(path, text, position, "expected ',' or ']' after a row")
        if delimiter == "]":
            break
        position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise _syntax_error(path, text, rest, "text after the end of the list")


def _parse_at(path: Path, text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _syntax_error(path, text, error.pos, error.msg) from None
    except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, thousands of brackets
        raise _syntax_error(path, text, position, str(error)) from None


def _syntax_error(path: Path, text: str, position: int, message: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(f"{path}:{line}:{column}: invalid JSON: {message}; what follows in this file was not read")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


# ---- a row a line ----


def _read_jsonl(path: Path) -> Iterator[Record | DataError]:
    index = 0
    with _open_lines(path) as file:
        for line, raw in enumerate(_split_lines(path, file), start=1):
            row = raw.removeprefix(_BOM) if line == 1 else raw
            if not row.strip():
                continue
            try:
                value = _DECODER.decode(row.decode())
            except UnicodeDecodeError as error:
                yield DataError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8")
            except json.JSONDecodeError as error:
                yield DataError(f"{path}:{line}:{error.colno}: invalid JSON: {error.msg}")
            except (ValueError, RecursionError) as error:
                yield DataError(f"{path}:{line}: invalid JSON: {error}")
            else:
                yield _record(value, path, line, index)
            index += 1


def _open_lines(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def _split_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    # Not the file's own lines: pyarrow's streams have none. Only \n ends a line; JSON strings may hold U+2028.
    pending: list[bytes] = []
    number = 1
    while True:
        try:
            block = file.read(1 << 20)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}:{number}: the compressed file is damaged or cut short: {error}") from None
        if not block:
            break
        first, *more = block.split(b"\n")
        pending.append(first)
        if more:
            yield b"".join(pending)
            yield from more[:-1]
            number += len(more)
            pending = [more[-1]]
    if any(pending):
        yield b"".join(pending)


# ---- tables ----


def _read_table(path: Path) -> Iterator[Record | DataError]:
    """Rows of a .csv or .tsv file, whose first line has the names. An empty cell says nothing."""
    index = 0
    # Not pyarrow's reader, which knows no line of a row.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            names = next(reader, [])
            if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
                raise DataError(
                    f"{path}:1: one column alone; its cells are divided by {mark!r}: write a .csv or .tsv file"
                )
            if len(set(names)) < len(names):
                raise DataError(f"{path}:1: the name {max(names, key=names.count)!r:.100} stands twice")
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(names):
                    row = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
                    yield _record(row, path, line, index)
                elif cells:
                    yield DataError(f"{path}:{line}: {len(cells)} cells, but the first line has {len(names)} names")
                index += bool(cells)
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{reader.line_num + 1}: not UTF-8 ({error.reason}); convert the file to UTF-8"
            ) from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}; what follows in this file was not read") from None


# ---- parquet ----


def _read_parquet(path: Path) -> Iterator[Record | DataError]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in _read_batch(batch):
                    if isinstance(value, Exception):
                        yield DataError(f"{path}:{index + 1}: a value of this row cannot be read: {value}")
                    else:
                        yield _record(without_nulls(value), path, index + 1, index)
                    index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{index + 1}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _read_batch(batch: Any) -> list[Any]:
    """The rows of a record batch; an exception in place of one that Python cannot hold (a date, say)."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        return [error] if len(batch) == 1 else [_read_batch(batch.slice(row, 1))[0] for row in range(len(batch))]


def without_nulls(value: Any) -> Any:
    """The value without what is null in its objects: columns have the fields of all rows, null where a row has none."""
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


# ---- JSON ----


def decode_json(text: str) -> Any:
    """Parse JSON text. Raises: ValueError or RecursionError: no JSON, a key that stands twice, a number without end."""
    return _DECODER.decode(text)


def _record(value: Any, path: Path, line: int, index: int) -> Record:
    return Record(value, f"{printable(str(path))}:{line}", index)


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r:.100} stands twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.100} is too large a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_as_object)
