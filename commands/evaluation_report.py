"""What evaluate.py found: the table, the worst conversations, the files, the bounds."""

import argparse
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from commands.compared import Bound, Column
from data_utils.sources import as_line, printable
from inference.estimates import Value, subtract
from inference.held_out import HeldOut, Result
from inference.metrics import match_exactly, measure_rouge_l
from tuning.checkpoint.files import replace_file
from tuning.console import say
from tuning.errors import SettingsError, explain_failed_write

_MOST_CHARACTERS = 300  # of a text among the worst conversations, on the terminal and in markdown


class Report:
    """Values of all models. values, results: by the names of the columns; held_out: None without --data."""

    def __init__(
        self,
        columns: Sequence[Column],
        values: Mapping[str, Mapping[str, Value]],
        held_out: HeldOut | None,
        results: Mapping[str, Result],
    ):
        self._columns, self._names = columns, [column.name for column in columns]
        self._values, self._held_out, self._results = values, held_out, results
        self._first, self._last = values[self._names[0]], values[self._names[-1]]

    def give(self, args: argparse.Namespace) -> int:
        """Print, write the files that args names, and hold the last model against args.bounds. Returns: exit code.

        Raises: SettingsError: a bound of a metric that was not measured. MachineError: a file cannot be written.
        """
        header, lines = self._table()
        _print_table(header, lines)
        worst = self._describe_worst(args.worst) if self._held_out else []
        for line in worst:
            say(line)
        if args.json:
            _write(args.json, json.dumps(self._to_json(args), ensure_ascii=False, indent=1, default=str) + "\n")
        if args.markdown:
            _write(args.markdown, _to_markdown(header, lines, worst))
        misses = list(filter(None, map(self._describe_miss, args.bounds)))
        for miss in misses:
            say(miss)
        return 1 if misses else 0

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines: each model's value, and its difference to the first one's, with standard errors."""
        header = ["", self._names[0]]
        for name in self._names[1:]:
            header += [name, "difference"]
        lines = []
        for metric, first in self._first.items():
            line = [metric, _show(first)]
            for other in self._names[1:]:
                value = self._values[other][metric]
                line += [_show(value), _show(subtract(value, first), sign=True)]
            lines.append(line)
        return [printable(title) for title in header], lines

    def _describe_worst(self, num: int) -> list[str]:
        """The conversations of the highest loss a token under the last model, with all answers."""
        held_out = self._held_out
        assert held_out is not None
        losses = {name: result.losses / held_out.num_targets for name, result in self._results.items()}
        last = self._names[-1]
        order = sorted(range(len(held_out.sources)), key=lambda number: -losses[last][number])[:num]
        lines = [f"highest loss a token of {last}:"] if order else []
        for number in order:
            shown = ", ".join(f"{name} {losses[name][number]:.4f}" for name in self._names)
            lines.append(f"{held_out.sources[number]}: loss {shown}")
            if (question := held_out.questions.get(number)) is None:
                continue
            lines += [f"  > {_cut(question.messages[-1])}", f"    expected: {_cut(question.expected)}"]
            for name in self._names:
                answer, message = self._results[name].answers[number]
                end = "" if answer.ended_by == "stop" else f"  [cut after {answer.num_tokens} tokens]"
                lines.append(f"    {name}: {_cut(message)}{end}")
        return [printable(line) for line in lines]

    def _describe_miss(self, bound: Bound) -> str | None:
        """A line if the last model does not keep a bound; NaN keeps none."""
        if bound.metric not in self._last:
            raise SettingsError(f"{bound.describe()}: no such metric here; there are {', '.join(self._last)}")
        value = self._last[bound.metric].value
        if value >= bound.value if bound.is_least else value <= bound.value:
            return None
        side = "below" if bound.is_least else "above"
        return printable(f"failed: {bound.metric} of {self._names[-1]} is {value:.4f}, {side} {bound.value:g}")

    def _to_json(self, args: argparse.Namespace) -> dict[str, Any]:
        names = ("data", "tasks", "max_new_tokens", "model_max_length", "supervise", "num_fewshot", "limit", "bits")
        metrics: dict[str, Any] = {}
        for metric, first in self._first.items():
            metrics[metric] = {}
            for name in self._names:
                value = self._values[name][metric]
                metrics[metric][name] = _describe(value)
                if name != self._names[0]:
                    metrics[metric][name]["difference"] = _describe(subtract(value, first))
        return {
            "models": {column.name: column.args.model for column in self._columns if not column.is_base},
            "order": self._names,
            "settings": {name: getattr(args, name) for name in (*names, "dtype", "batch_size")},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
            "metrics": metrics,
            "conversations": list(map(self._describe_conversation, range(len(self._sources)))),
        }

    @property
    def _sources(self) -> list[str]:
        return self._held_out.sources if self._held_out else []

    def _describe_conversation(self, number: int) -> dict[str, Any]:
        held_out = self._held_out
        assert held_out is not None
        tokens = int(held_out.num_targets[number])
        found: dict[str, Any] = {"source": held_out.sources[number], "tokens": tokens}
        found["loss"] = {name: result.losses[number] / tokens for name, result in self._results.items()}
        if (question := held_out.questions.get(number)) is None:
            return found
        answers = {}
        for name, result in self._results.items():
            answer, message = result.answers[number]
            answers[name] = {
                "message": message,
                "ended_by": answer.ended_by,
                "tokens": answer.num_tokens,
                "exact_match": match_exactly(message, question.expected),
                "rouge_l": measure_rouge_l(message["content"], question.expected["content"]),
            }
        return {**found, "messages": question.messages, "expected": question.expected, "answers": answers}


def _describe(value: Value) -> dict[str, Any]:
    numbers = {"value": value.value, "standard_error": value.standard_error}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _show(value: Value, *, sign: bool = False) -> str:
    """As 0.0031 ± 0.0004."""
    number, error = value.value, value.standard_error
    size = max(abs(number), 0 if math.isnan(error) else error)
    places = ".4f" if size < 10 else ".2f" if size < 10_000 else ".4g"
    shown = format(number, ("+" if sign else "") + places)
    return shown if math.isnan(error) else f"{shown} ± {format(error, places)}"


def _cut(message: Mapping[str, Any]) -> str:
    """A message in one line, what is long without its middle."""
    calls = [each["function"] for each in message.get("tool_calls") or ()]
    said = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return as_line(" ".join(filter(None, [message["content"], *said])), _MOST_CHARACTERS)


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(header):
        table.add_column(Text(title), justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(Text, line))
    # As wide as it is: cut to a pipe's 80 columns it would lack numbers.
    Console(width=Console(width=10_000).measure(table).maximum).print(table)


def _to_markdown(header: Sequence[str], lines: Sequence[Sequence[str]], worst: Sequence[str]) -> str:
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    table = "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)
    # Indented, so that no text of a conversation is markup.
    return table + ("\n" + "".join(f"    {line}\n" for line in worst) if worst else "")


def _write(file: str, text: str) -> None:
    with explain_failed_write(Path(file), "run the command again"):
        replace_file(Path(file), text.encode())
