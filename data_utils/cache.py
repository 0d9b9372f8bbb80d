"""Where tokenised rows are kept, and when they may be taken again.

An entry is a directory named by a hash of everything its rows follow from: the data's bytes, the tokenizer, the chat
template, the options, and the code of this package. So a stale one is never found. It is complete when its account
lies in it, which is written last, with the hashes of all files: a damaged entry is built again. Who builds one holds
its lock; who comes later waits for that.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_utils.new_tokens import list_content_tokens
from data_utils.sources import DataError, hash_file
from data_utils.template import ChatTemplate

_ACCOUNT = "account.json"


class Entry:
    """One set of rows. directory: its place. account: what was sealed; None where it has to be built."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.account: dict[str, Any] | None = None
        try:
            sealed = json.loads((directory / _ACCOUNT).read_text(encoding="utf-8"))
            if sealed["seal"] == _hash([sealed["files"], sealed["account"]]) and sealed["files"] == self._hash_files():
                self.account = sealed["account"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass

    def seal(self, account: dict[str, Any]) -> None:
        """Say that everything is written, when it is on the disk."""
        for path in self._files():
            _sync(path)
        files = self._hash_files()
        text = json.dumps({"files": files, "account": account, "seal": _hash([files, account])}, ensure_ascii=False)
        temporary = self.directory / f".{_ACCOUNT}.tmp"
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.directory / _ACCOUNT)
        _sync(self.directory)
        self.account = account

    def _files(self) -> list[Path]:
        found = sorted(path for path in self.directory.iterdir() if not path.name.startswith("."))
        return [path for path in found if path.name != _ACCOUNT]

    def _hash_files(self) -> dict[str, str]:
        return {path.name: hash_file(path) for path in self._files()}


class RowCache:
    """Where entries lie.

    root: their directory, or None: each is built in a temporary one, which goes with this object. say: takes a line.
    """

    def __init__(self, root: Path | None, say: Callable[[str], None] = print):
        self._root = root
        self._say = say
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
            if entry.account is None:
                if (directory / _ACCOUNT).exists():
                    self._say(f"{directory}: these tokenised data are damaged; they are built again")
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(exist_ok=True)
            yield entry
        finally:
            lock.release()


def default_root(cache_dir: str | None, kind: str = "tokenised") -> Path | None:
    """Where tokenised data, or another kind, are kept: in cache_dir, or the user's cache directory.

    Returns: None: the user has no home.
    """
    named = cache_dir or os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(named) if named else Path.home() / ".cache"
    except RuntimeError:  # containers run under user numbers that have neither HOME nor an entry in passwd
        return None
    return root / "finetune" / kind


def _describe_template(template: ChatTemplate) -> list[Any]:
    tokenizer = template.tokenizer
    return [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        list_content_tokens(tokenizer),
        template.system_message,
        template.label_mask,
        date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else None,  # it writes the date
    ]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _describe_code() -> list[str]:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return [*versions, *(path.read_text(encoding="utf-8") for path in sources)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
