"""Rows of a run's data files, found again by place and id: what was asked and answered, and the label view of a few."""

import functools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from commands.report_page.markup import Markup
from commands.report_page.runs import Run
from data_utils.conversations import read_names
from data_utils.schema import Conversation, parse_record
from data_utils.sources import DataError, Source, as_line, hash_file, printable, read_records
from tuning.checkpoint.ownership import list_checkpoints
from tuning.errors import SettingsError, explain_bad_files

_MAX_FILE_MIB = 256  # a larger file takes too long to be read for a few rows


# `file:line` of a row, and its id: the rows of a .json file without line ends share one place.
Place = tuple[str, str]


class DataRows:
    """Conversations of a run by place. notes: why files were not read, a line each."""

    def __init__(self) -> None:
        self.conversations: dict[Place, Conversation] = {}
        self.notes: list[str] = []

    def texts(self, place: Place) -> tuple[str, str] | None:
        """(what came before the first trained answer, that answer) of a row; None where it is not there."""
        conversation = self.conversations.get(name_conversation(place))
        if conversation is None:
            return None
        if conversation.text is not None:
            return "", conversation.text
        turns = conversation.supervised_turns
        if not turns:
            return None
        before = conversation.messages[turns[0] - 1] if turns[0] else {}
        answer = conversation.messages[turns[0]]
        return before.get("content") or "", answer.get("content") or str(answer.get("tool_calls") or "")


def name_conversation(place: Place) -> Place:
    """Where a row's conversation is: its second row is ID#2."""
    return place[0], re.sub(r"#\d+$", "", place[1])


def read_rows(run: Run, places: Collection[Place], *, num_first: int = 0) -> DataRows:
    """Find rows again in the run's data files, unless these are gone, changed or large.

    num_first: how many of the first file's first rows, too.
    """
    found = DataRows()
    conversations = set(map(name_conversation, places))
    files = run.find("data", "files")
    for file in files if isinstance(files, list) else []:
        name, digest = (file.get("path"), file.get("sha256")) if isinstance(file, dict) else (None, None)
        if not isinstance(name, str):
            continue
        name = re.sub(r"#\d+$", "", name)  # a sample keeps its lines
        label = printable(name)
        wanted = frozenset(place for place in conversations if place[0].rpartition(":")[0] == label)
        if not wanted and not num_first:
            continue
        path = Path(str(run.find("directory") or ""), name)
        if why := _explain_unread(path):
            found.notes.append(f"{label}: {why}: its rows are not shown")
            continue
        stamp = path.stat()
        key = (path, stamp.st_mtime_ns, stamp.st_size)
        if digest != _hash(*key):
            found.notes.append(f"{label}: changed since the run: its rows are not shown")
            continue
        found.conversations |= _read_file(*key, label, wanted, num_first, *_reading_options(run))
        num_first = 0
    return found


def _explain_unread(path: Path) -> str | None:
    try:
        if not path.is_file():
            return "not here"
        return f"larger than {_MAX_FILE_MIB} MiB" if path.stat().st_size > _MAX_FILE_MIB * 2**20 else None
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


@functools.lru_cache(maxsize=64)
def _hash(path: Path, _mtime_ns: int, _size: int) -> str:
    return hash_file(path)


def _reading_options(run: Run) -> tuple[str | None, str, tuple[tuple[str, str], ...]]:
    given = run.find("settings", "data", "map")
    words = [word for word in given if isinstance(word, str)] if isinstance(given, list) else []
    names = dict(read_names([pair for word in words for pair in word.split(",")]))
    supervise = run.find_text("settings", "data", "supervise")
    return run.find_text("settings", "data", "data_format"), supervise or "all", tuple(names.items())


@functools.lru_cache(maxsize=16)
def _read_file(
    path: Path,
    _mtime_ns: int,
    _size: int,
    label: str,
    wanted: frozenset[Place],
    num_first: int,
    data_format: str | None,
    supervise: str,
    names: tuple[tuple[str, str], ...],
) -> dict[Place, Conversation]:
    source = Source(path)
    found: dict[Place, Conversation] = {}
    lines = {where for where, _ in wanted}
    for number, record in enumerate(read_records(source)):
        if number >= num_first and wanted <= found.keys():
            break
        if isinstance(record, DataError):
            continue
        where = f"{label}:{record.where.rpartition(':')[2]}"
        if where not in lines and number >= num_first:
            continue
        try:
            conversation = parse_record(
                record, name=source.name, data_format=data_format, supervise=supervise, names=dict(names)
            )
        except DataError:
            continue
        place = where, name_conversation((where, conversation.id))[1]
        if place in wanted or number < num_first:
            found.setdefault(place, conversation)
    return found


# ---- label view ----


def show_labels(run: Run, conversations: dict[Place, Conversation]) -> list[Markup]:
    """The label view of conversations, by the tokenizer that was saved with the run.

    Raises: SettingsError: there is none yet, or it cannot be used.
    """
    directory = next(
        (place for place in (run.directory, *reversed(list_checkpoints(run.directory))) if _has_tokenizer(place)), None
    )
    if directory is None:
        raise SettingsError("the tokenizer is saved with the first checkpoint; until then rows are not shown")
    from data_utils.rows import cut_row
    from data_utils.show import as_section

    system, mask = (run.find_text("settings", "data", key) for key in ("system_message", "label_mask"))
    limit = run.find("settings", "data", "model_max_length")
    with explain_bad_files(f"{directory}: rows cannot be shown"):
        template = _load_template(directory, (directory / "tokenizer.json").stat().st_mtime_ns, system, mask)
        sections = []
        for (where, _), conversation in conversations.items():
            rows = template.encode_conversation(conversation)
            parts = [part for row in rows for part in (cut_row(row, limit) if isinstance(limit, int) else [row])]
            for number, part in enumerate(parts, 1):
                row_id = f"{conversation.id}#{number}" if len(parts) > 1 else conversation.id
                sections.append(Markup(as_section(row_id, where, part, template)))
        return sections


def _has_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file()


@functools.lru_cache(maxsize=4)
def _load_template(directory: Path, _mtime_ns: int, system_message: str | None, label_mask: str | None) -> Any:
    from data_utils.template import ChatTemplate
    from data_utils.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(directory), system_message=system_message)
    return ChatTemplate(tokenizer, system_message=system_message, label_mask=label_mask or "assistant")


def shorten(text: str, limit: int = 160) -> str:
    """The beginning of a text, in one line."""
    line = as_line(text[: limit + 1], 10 * limit)
    return line if len(text) <= limit else f"{line[:limit]}..."
