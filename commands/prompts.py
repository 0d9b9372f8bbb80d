"""Prompts of a file, and the file of their answers. No torch."""

import argparse
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from data_utils.hub_data import find_data
from data_utils.report import DataErrors
from data_utils.schema import Conversation, parse_record
from data_utils.sources import FORMATS, DataError, Record, printable, read_lines, read_records
from tuning.errors import SettingsError, explain_failed_write, read_json_object

# What an answer follows from, beside its prompt.
_SETTINGS = (
    *("model", "base", "dtype", "bits", "device_map", "kv_cache", "raw", "system", "tools"),
    *("batch_size", "max_new_tokens", "temperature", "seed", "files"),
)


_READ_BYTES = 2**24
_locks: dict[Path, TextIO] = {}  # held until the process ends


@dataclass(frozen=True)
class Prompt:
    """What is asked: a line of text, or a conversation.

    expected: the answer that the file has for it: its text, or a message with calls of tools.
    """

    text: str | None = None
    asked: Conversation | None = None
    expected: str | dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """How an answer's line begins."""
        if self.asked is None:
            return {"prompt": self.text}
        more: dict[str, Any] = {"tools": list(self.asked.tools)} if self.asked.tools else {}
        if self.asked.template_kwargs:
            more["chat_template_kwargs"] = self.asked.template_kwargs
        return {"source": self.asked.where, "messages": list(self.asked.messages), **more}

    def record(self, message: dict[str, Any], text: str, ended_by: str) -> dict[str, Any]:
        """The line of an answer. Of a conversation it can be read as data again: messages ends with the answer."""
        line = self.describe()
        if "messages" in line:
            line["messages"] = [*line["messages"], message]
        line |= {"answer": text, "ended_by": ended_by}
        return line if self.expected is None else {**line, "expected": self.expected}


def read_prompts(path: str, *, raw: bool = False) -> list[Prompt]:
    """The prompts of a file: of data (sources.FORMATS) its conversations, of any other file its lines.

    A directory is data, too. A conversation that ends with an assistant's turn asks for that one. raw: texts, which
    are continued.

    Raises: DataError: no such file, or rows that cannot be read, all of them.
    """
    if not _is_data(path):
        return [Prompt(line) for line in read_lines(path)]
    prompts, problems = [], []
    for source in find_data([path]):
        for record in read_records(source):
            try:
                if isinstance(record, DataError):
                    raise record
                prompts.append(_as_prompt(parse_record(_complete(record), name=source.name), raw=raw))
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataErrors(problems)
    return prompts


def _is_data(path: str) -> bool:
    if path.startswith(("hf:", "ms:")) or Path(path).is_dir():
        return True
    name = path if Path(path).exists() else re.sub(r"(#[0-9]+)?(\*[0-9.]+)?$", "", path)
    return name.lower().endswith(FORMATS)  # .JSONL is refused as data, and not asked line by line


def _complete(record: Record) -> Record:
    """A row that has a prompt and no completion, as messages."""
    row = record.value
    if not isinstance(row, dict) or "prompt" not in row or "completion" in row:
        return record
    row = dict(row)
    prompt = row.pop("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Record({"messages": messages, **row}, record.where, record.index)


def _as_prompt(conversation: Conversation, *, raw: bool) -> Prompt:
    where, messages = conversation.where, conversation.messages
    if conversation.text is not None:
        if raw:
            return Prompt(conversation.text)
        raise DataError(f"{where}: text: is no question; --raw continues it")
    if raw:
        raise DataError(f"{where}: a conversation, which --raw cannot continue; it takes 'text' rows, or lines")
    expected = None
    if messages[-1]["role"] == "assistant":
        last, messages = messages[-1], messages[:-1]
        expected = last if last.get("tool_calls") else last["content"]
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise DataError(f"{where}: nothing is asked: no user's turn before the answer")
    asked = Conversation(
        conversation.id,
        messages,
        where,
        tools=conversation.tools,
        template_kwargs=conversation.template_kwargs,
        places=conversation.places[: len(messages)],
    )
    return Prompt(asked=asked, expected=expected)


def check_answers(args: argparse.Namespace, prompts: Sequence[Prompt], named: str) -> bool:
    """Hold args.out against what is asked. Sets args.first: how many answers are in it.

    named: the model, as the user names it. Returns: whether any answer is lacking.

    Raises: SettingsError: another file, or answers that were made in another way.
    """
    out, beside = Path(args.out), _settings_file(args.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise SettingsError(f"--out {out}: {'is a directory' if out.is_dir() else 'its directory is not there'}")
    args.first = 0
    made_by = {name: getattr(args, name, None) for name in _SETTINGS}
    made_by |= {"model": str(named), "files": _hash_model(Path(args.model))}
    if out.exists() and not beside.is_file():
        raise SettingsError(f"--out {out}: is there, and was not made by this; name another file")
    # An empty one is of a process that was killed before it wrote it.
    before = read_json_object(beside) if beside.is_file() and beside.stat().st_size else made_by
    if set(before) != set(_SETTINGS):
        raise SettingsError(f"--out {out}: {beside} is there, and was not made by this; name another file")
    with explain_failed_write(beside, "run the command again"):
        _lock(beside)
    if out.exists():
        changed = [name for name in _SETTINGS if before.get(name) != made_by[name]]
        if changed:
            was = ", ".join(f"--{name} {before.get(name)} (now {made_by[name]})" for name in changed)
            raise SettingsError(f"--out {out}: was begun with {was}; use the same, or name another file")
        args.first = _count_answers(out, prompts)
    with explain_failed_write(beside, "run the command again"):
        beside.write_text(json.dumps(made_by, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return args.first < len(prompts)


def _hash_model(directory: Path) -> str | None:
    """What tells one model from another in the same directory, without reading its weights; of hub names nothing."""
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix != ".safetensors" and path.stat().st_size < _READ_BYTES:
            digest.update(path.read_bytes())  # manifest.json has the hashes of our results' weights
    return digest.hexdigest()[:16]


def _lock(file: Path) -> None:
    """Hold a file, made where it is not there, for this process. Raises: SettingsError: another one has it."""
    file = file.resolve()
    if file in _locks:
        return
    opened = open(file, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise SettingsError(f"{file}: another process is writing these answers; wait for it") from None
    except OSError:  # a file system without locks
        pass
    _locks[file] = opened


def _settings_file(out: str) -> Path:
    return Path(f"{out}.settings.json")


def _count_answers(out: Path, prompts: Sequence[Prompt]) -> int:
    """How many of the prompts have whole lines; what was half written is cut off. Raises: SettingsError: other ones."""
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    for number, line in enumerate(lines):
        if number >= len(prompts) or not _answers(line, prompts[number]):
            raise SettingsError(f"--out {out}:{number + 1}: answers another prompt; name another file")
    if len(whole) < len(data):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def _answers(line: bytes, prompt: Prompt) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    if not isinstance(found, dict):
        return False
    if isinstance(found.get("messages"), list):
        found["messages"] = found["messages"][:-1]
    described: dict[str, Any] = json.loads(json.dumps(prompt.describe()))
    return {name: found.get(name) for name in described} == described


def write_answers(out: str | None, lines: Iterator[dict[str, Any]]) -> None:
    """Add lines to a file, or print them, each as it comes."""
    if out is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    with open(out, "a", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()


def describe_answers(args: argparse.Namespace, num_prompts: int) -> str:
    """One line of what was done."""
    before = "all" if args.first == num_prompts else f"{args.first:,}"
    return printable(f"{num_prompts:,} answers in {args.out}" + (f", {before} of them before" if args.first else ""))
