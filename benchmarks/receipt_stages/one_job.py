"""What runs in a job's own process: its entries one by one, each written when it is done."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cells import Figures
from benchmarks.receipt_stages.jobs import find_cell


class CheckError(Exception):
    """A result too far off. figures: what was measured."""

    def __init__(self, message: str, figures: Figures):
        super().__init__(message)
        self.figures = figures


def end_with_parent() -> None:
    """End this process when the one that started it has gone: it would take the device from the next receipt's jobs.

    Standard input is a pipe from there, on which nothing is ever written.
    """

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_job(stage: str, names: list[str], lines: Path, cell: tuple[str, bool] | None) -> None:
    """Measure entries and append each to a file, a line of JSON.

    cell: to profile: its name, and whether activations are recomputed.
    """
    checks = _list_checks(stage, names, cell)
    for name in names:
        began = time.perf_counter()
        entry: dict[str, Any] = {"stage": stage, "name": name}
        try:
            entry |= {"status": "ok", "figures": checks[name]()}
        except Exception as error:  # whatever fails is a result; the next entry goes on
            entry |= {"status": "failed", "error": _describe(error)}
            if isinstance(error, CheckError):
                entry["figures"] = error.figures
        entry["wall_s"] = round(time.perf_counter() - began, 2)
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if entry["status"] == "failed" and _is_device_lost():
            return  # the other entries get a new process


def _is_device_lost() -> bool:
    """Whether a kernel broke this process's context, so that whatever comes next fails, too."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _list_checks(stage: str, names: list[str], cell: tuple[str, bool] | None) -> dict[str, Callable[[], Figures]]:
    if stage == "environment":
        from benchmarks.receipt_stages import environment

        return environment.list_checks()
    if stage == "correctness":
        from benchmarks.receipt_stages import correctness

        return correctness.list_checks()
    if stage == "profile":
        from benchmarks.random_models import choose_device
        from benchmarks.receipt_stages import profiled

        assert cell is not None
        name, lean = cell
        found = replace(find_cell("training", name, rehearsal=choose_device().type == "cpu"), lean=lean)
        return {names[0]: lambda: profiled.run(found, name)}
    from benchmarks.receipt_stages import training

    return {names[0]: lambda: training.run(stage, names[0])}


def _describe(error: Exception) -> str:
    from tuning.machine import is_out_of_memory
    from tuning.messages import first_line

    return "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {first_line(error)}"[:300]
