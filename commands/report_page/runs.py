"""A run's directory, read: run.json, metrics.jsonl, and where its rows.parquet is. It may still be training."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.checkpoint.ownership import is_run, list_checkpoints
from tuning.checkpoint.run_record import METRICS_FILE, PROGRAM, ROWS_FILE, RUN_FILE
from tuning.errors import SettingsError, read_json_object


@dataclass
class Run:
    """What a run's directory holds.

    name: as it was given. record: run.json. metrics: the lines of metrics.jsonl. unread_lines: those that are no
    JSON objects. rows_file: the newest rows.parquet, its own or that of its last checkpoint; None: it has none.
    """

    name: str
    directory: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    unread_lines: int
    rows_file: Path | None

    def find(self, *names: str) -> Any:
        """A value inside run.json; None where it, or what should hold it, is not there."""
        value: Any = self.record
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def find_text(self, *names: str) -> str | None:
        """A text inside run.json; None where there is none."""
        value = self.find(*names)
        return value if isinstance(value, str) else None

    @property
    def status(self) -> str:
        """As run.json has it: "running", "finished", ..."""
        return str(self.record.get("status", "unknown"))

    @property
    def is_running(self) -> bool:
        """Whether it says that it still trains. One that was killed says so, too."""
        return self.status == "running"

    @property
    def kind(self) -> str:
        """What trains: "LoRA", "Q-LoRA" or "full"."""
        lora = self.find("settings", "lora", "use_lora")
        return "Q-LoRA" if self.find("settings", "lora", "q_lora") else "LoRA" if lora else "full"

    @property
    def planned_gib(self) -> float | None:
        """Planned peak memory of a device, GiB; None where there is no plan of it."""
        planned = self.find("plan", "memory", "total")
        return planned / 2**30 if is_number(planned) else None

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every line that has a number under a key."""
        pairs: Iterator[tuple[Any, Any]] = ((entry.get("step"), entry.get(key)) for entry in self.metrics)
        return [(float(step), float(value)) for step, value in pairs if is_number(step) and is_number(value)]

    def samples(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(step, [{"prompt", "answer", "ended_by"}, ...]) of every evaluation that answered prompts."""
        for entry in self.metrics:
            if isinstance(entry.get("samples"), list) and is_number(entry.get("step")):
                yield int(entry["step"]), [each for each in entry["samples"] if isinstance(each, dict)]


def read_runs(directories: list[str]) -> list[Run]:
    """Read runs. Raises: SettingsError: all that are none, a line each."""
    runs, mistakes = [], []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except SettingsError as error:
            mistakes.append(str(error))
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return runs


def read_run(name: str) -> Run:
    """Read a run. Raises: SettingsError: no directory, none of a run's, a damaged run.json or metrics.jsonl."""
    directory = Path(name)
    check_is_run(directory)
    record = read_json_object(directory / RUN_FILE)
    if not is_run(directory):
        raise SettingsError(f"{directory / RUN_FILE}: is not {PROGRAM}'s")
    metrics, unread_lines = _read_metrics(directory / METRICS_FILE)
    return Run(name, directory, record, metrics, unread_lines, _find_rows(directory))


def check_is_run(directory: Path) -> None:
    """See that a directory holds a run. Raises: SettingsError."""
    if not directory.is_dir():
        raise SettingsError(f"{directory}: {'is no directory' if directory.exists() else 'no such directory'}")
    if not (directory / RUN_FILE).is_file():
        raise SettingsError(f"{directory}: no {RUN_FILE} in it; name the --output_dir of a run of {PROGRAM}")


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and how many are damaged. A last line without its end is still being written: it does not count."""
    if not path.exists():
        return [], 0
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    metrics, unread = [], 0
    for line in text.split("\n")[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            metrics.append(entry)
        else:
            unread += 1
    return metrics, unread


def _find_rows(directory: Path) -> Path | None:
    places = [directory, *reversed(list_checkpoints(directory))]
    return next((place / ROWS_FILE for place in places if (place / ROWS_FILE).is_file()), None)


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
