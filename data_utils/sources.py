"""Files to records: every record knows its file and line.

Standard library only, so that a data file can be read without torch or transformers.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A mistake in the user's data. The message says what, where (file:line:field) and the way out."""


@dataclass(frozen=True)
class Record:
    """One row of a data file. `where` is `file:line`, for messages; `index` counts rows from 0."""

    value: Any
    where: str
    index: int


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the rows of a .json (one list) or .jsonl (one value a line) file.

    Raises: DataError: no such file, not UTF-8, invalid JSON (line and column), no list, nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a directory, not a data file" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {kind}; expected a .json or .jsonl file")
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: unknown format '{path.suffix}'; name it .json (a list) or .jsonl (one row a line)")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    num_records = 0
    for record in _read_jsonl(path, text) if path.suffix == ".jsonl" else _read_json(path, text):
        num_records += 1
        yield record
    if num_records == 0:
        raise DataError(f"{path}: no rows in it; expected at least one conversation")


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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path, text: str) -> Iterator[Record]:
    # json.loads knows no line of an element, so the list is walked here and its elements are parsed one by one.
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if position == len(text):
        raise DataError(f"{path}: empty file; expected a JSON list of conversations")
    if text[position] != "[":
        _parse_at(decoder, path, text, position)
        way_out = "put the row in [ ]" if text[position] == "{" else "expected [{...}, ...]"
        raise DataError(f"{path}:1: not a JSON list; {way_out}, or name a file with one row a line .jsonl")
    position = _skip_space(text, position + 1)
    line, counted, index = 1, 0, 0
    while text[position : position + 1] != "]" or index > 0:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _parse_at(decoder, path, text, position)
        yield Record(value, f"{path}:{line}", index)
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


def _read_jsonl(path: Path, text: str) -> Iterator[Record]:
    index = 0
    # Not splitlines(): it also breaks at U+2028 and its kin, which JSON strings may hold.
    for line, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line}:{error.colno}: invalid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise DataError(f"{path}:{line}: invalid JSON: {error}") from None
        yield Record(value, f"{path}:{line}", index)
        index += 1


def _parse_at(decoder: json.JSONDecoder, path: Path, text: str, position: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _syntax_error(path, text, error.pos, error.msg) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise _syntax_error(path, text, position, str(error)) from None


def _syntax_error(path: Path, text: str, position: int, message: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(f"{path}:{line}:{column}: invalid JSON: {message}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
