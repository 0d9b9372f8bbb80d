"""Where tokenised rows are kept, and when they may be taken again.

An entry is a directory named by a hash of everything its rows follow from: the data's bytes, the tokenizer, the chat
template, the options, and the code of this package. So a stale one is never found. It is complete when its account
lies in it, which is written last. Who builds one holds its lock; who comes later waits for that.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_utils.sources import DataError
from data_utils.template import ChatTemplate

_ACCOUNT = "account.json"


class Entry:
    """One set of rows, complete or about to be built. directory is its place."""

    def __init__(self, directory: Path):
        self.directory = directory

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        try:
            found = self._read()
            sizes = found["sizes"]
            found["account"]["files"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return all(
            (self.directory / name).is_file() and (self.directory / name).stat().st_size == size
            for name, size in sizes.items()
        )

    def seal(self, account: dict[str, Any]) -> None:
        """Say that everything is written."""
        files = sorted(path for path in self.directory.iterdir() if not path.name.startswith("."))
        sizes = {path.name: path.stat().st_size for path in files if path.name != _ACCOUNT}
        temporary = self.directory / f".{_ACCOUNT}.tmp"
        temporary.write_text(json.dumps({"sizes": sizes, "account": account}, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.directory / _ACCOUNT)

    def read(self) -> dict[str, Any]:
        """The account that was sealed."""
        return self._read()["account"]

    def _read(self) -> dict[str, Any]:
        return json.loads((self.directory / _ACCOUNT).read_text(encoding="utf-8"))


class RowCache:
    """root: where entries lie, or None: each is built in a temporary directory of its own, and forgotten."""

    def __init__(self, root: Path | None):
        self._root = root
        self._temporary: list[tempfile.TemporaryDirectory[str]] = []

    @contextlib.contextmanager
    def entry(self, data: Any, template: ChatTemplate, options: dict[str, Any]) -> Iterator[Entry]:
        """The entry of these data, held while it is looked at or built.

        Raises: DataError: its place cannot be written to.
        """
        if self._root is None:
            self._temporary.append(tempfile.TemporaryDirectory(prefix="tokenised-"))
            yield Entry(Path(self._temporary[-1].name))
            return
        directory = self._root / _hash([data, _describe_template(template), options, _describe_code()])
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(directory.with_suffix(".lock"))
            lock.acquire()
        except OSError as error:
            raise DataError(
                f"{self._root}: cannot keep tokenised data here ({error.strerror}); use another --cache_dir, or "
                "--no_cache True"
            ) from None
        try:
            entry = Entry(directory)
            if not entry.complete:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(exist_ok=True)
            yield entry
        finally:
            lock.release()


def default_root(cache_dir: str | None) -> Path:
    """cache_dir, or the user's cache directory."""
    root = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "finetune" / "tokenised"


def _describe_template(template: ChatTemplate) -> list[Any]:
    tokenizer = template.tokenizer
    return [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        template.system_message,
        template.label_mask,
        date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else None,  # it writes the date
    ]


@functools.cache
def _describe_code() -> list[str]:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return [*versions, *(path.read_text(encoding="utf-8") for path in sources)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
