"""Errors that users see as one line."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path


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
