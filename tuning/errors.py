"""Errors that users see as one line."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class SettingsError(ValueError):
    """A setting that cannot work or would be ignored. The message names it and the way out."""


class MachineError(RuntimeError):
    """The run failed though its settings are valid: memory, disk, a lost process, a non-finite loss.

    agreed: all ranks raise the same message, so that one per machine prints it.
    """

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


@contextlib.contextmanager
def explain_failed_write(path: Path, then: str) -> Iterator[None]:
    """Turn the failures of a write (a full disk, a directory that became read-only) into one line.

    then: what to do when the cause is gone.

    Raises: MachineError.
    """
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers raise errors of their own, with the system's inside.
        if not isinstance(error, OSError) and "os error" not in str(error) and "IoError" not in str(error):
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        why = re.sub(r".*error: | \(os error \d+\)", "", text, flags=re.IGNORECASE)
        full = any(words in why for words in ("No space left", "File too large", "quota"))
        remedy = "make room" if full else "make it writable"
        raise MachineError(f"{path}: could not be written: {why}; {remedy}, then {then}") from error


@contextlib.contextmanager
def explain_bad_files(what: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what a library raises at files that others wrote, whatever it is, into one line.

    what: the line's beginning: the place, and what was tried there. but: exceptions that are left as they are.

    Raises: SettingsError.
    """
    try:
        yield
    except (SettingsError, MachineError, MemoryError):
        raise
    except but:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise SettingsError(f"{what}: {kind}{line}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that others may have written. Raises: SettingsError: it holds no object, or odd numbers."""

    def parse(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is not a number that can be used")
        return value

    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_float=parse, parse_constant=parse)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{error.lineno}: invalid JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{path}: cannot be read: {why}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a JSON object")
    return values
