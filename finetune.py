"""Fine-tune a chat model on conversations: python finetune.py --model_name_or_path M --data_path D --output_dir O.

`--help` lists the options that matter, `--help-all` every one. From Python: finetune.run({"model_name_or_path": ...}).
What a run does stands in commands/finetune.py.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.paths import check_data, find_missing_paths
from data_utils.report import DataErrors
from data_utils.sources import DataError
from tuning.checkpoint.output_directory import PLAN_FILE
from tuning.checkpoint.run_record import RUN_FILE
from tuning.console import say
from tuning.distributed.mpi import join_mpi
from tuning.entry import MISTAKE, run_entry, show_mistakes
from tuning.errors import SettingsError
from tuning.settings.command_line import read_mapping, read_settings
from tuning.settings.options import Settings
from tuning.settings.other_tools import translate_file


def main(argv: list[str] | None = None) -> int:
    """Run one fine-tuning. Returns: exit code. Raises: DataError, SettingsError: the user's mistakes."""
    began = time.perf_counter()
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--translate"]:
        if len(words) != 2:
            raise SettingsError("--translate: name one YAML file: python finetune.py --translate FILE.yaml")
        print(translate_file(Path(words[1])), end="")
        return 0
    join_mpi()
    return _train(read_settings(words, find_missing_paths), began)


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tune from Python. settings: by the names of the options, as in a YAML file.

    Returns: what OUTPUT/run.json says of the run (of a dry run: plan.json).

    Raises: DataError, SettingsError: mistakes, a line each. MachineError: what the machine could not do.
    """
    found = read_mapping(settings, find_missing_paths)
    _train(found, time.perf_counter())
    file = PLAN_FILE if found.run.dry_run else RUN_FILE
    record: dict[str, Any] = json.loads(Path(found.run.output_dir, file).read_text(encoding="utf-8"))
    return record


def _train(settings: Settings, began: float) -> int:
    say(f"starting: {settings.describe()}")
    shown: list[str] = []
    try:
        check_data(settings)
    except DataErrors as error:
        shown = error.messages
        show_mistakes(error)
    from commands import finetune  # torch and transformers, once nothing is left to say without them

    try:
        return finetune.run(settings, began=began)
    except DataErrors as error:  # these, and those that take a tokenizer to find
        if rest := [message for message in error.messages if message not in shown]:
            raise DataErrors(rest) from None
        return MISTAKE


def run_script() -> None:
    """The command, with its mistakes in one line each and its exit code."""
    run_entry(main, mistakes=(DataError,), interrupted="interrupted before training began or after it ended")


if __name__ == "__main__":
    run_script()
