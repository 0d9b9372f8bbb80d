"""Files written in one go: a reader sees the old one or the new one, also after a power cut."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one go: a reader sees the old file or the new one, also after a power cut."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Give a file its content in one go."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """See that names in a directory are on disk: of new, renamed and deleted files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
