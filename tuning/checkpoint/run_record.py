"""What a run was and what it measured: run.json, metrics.jsonl, and the name of rows.parquet."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuning.checkpoint.files import write_json
from tuning.errors import MachineError, explain_failed_write
from tuning.messages import RESUME_HINT

PROGRAM = "finetune.py"  # what run.json and the owner's mark say of who wrote them
RUN_FILE, METRICS_FILE, ROWS_FILE = "run.json", "metrics.jsonl", "rows.parquet"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
_OPTIONAL = ("deepspeed", "bitsandbytes", "gptqmodel")  # part of some runs; None where not installed


@dataclass(frozen=True)
class RunFacts:
    """What manifests say of the run that wrote them, and what a resumed run is compared with.

    trajectory: what determines the weights after each step, beside rows_per_step. layout: what changes only rounding
    and dropout (ranks, engine, micro-batch size). rows_per_step: conversations of a step; None until known.
    """

    trajectory: dict[str, Any]
    layout: dict[str, Any]
    command: str
    versions: dict[str, Any]
    quantization: dict[str, Any] | None
    rows_per_step: int | None = None

    def with_step(self, rows_per_step: int) -> "RunFacts":
        """The same, once it is known how many conversations a step has."""
        return replace(self, rows_per_step=rows_per_step)


@dataclass
class RunRecord:
    """run.json: what a run is, and at its end what it measured.

    status: "planned" (nothing is written), "running", "finished", "stopped by SIGNAL", "failed: MESSAGE".
    facts: what its manifests say. values: what else is known when it begins. results: of StepTrainer.summarize.
    sessions: of a run that was resumed there are several: {"began", "ended" (UTC; None: it was killed), "first_step",
        "wall_s"}; the last one is this process's, which began at time.perf_counter() `began`.
    """

    directory: Path
    facts: RunFacts
    values: dict[str, Any]
    status: str = "planned"
    results: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def begin_session(self, earlier: list[dict[str, Any]], first_step: int) -> None:
        """This process goes on from earlier sessions with a step."""
        passed = timedelta(seconds=time.perf_counter() - self.began)
        session = {"began": _write_time(datetime.now(UTC) - passed), "ended": None, "first_step": first_step}
        self.sessions = [*earlier, session]

    def write(self, status: str) -> None:
        """Write run.json with a new status. Raises: MachineError: the disk is full, say."""
        self.status = status
        if self.sessions and status != "running":
            wall_s = round(time.perf_counter() - self.began, 1)
            self.sessions[-1] |= {"ended": _write_time(datetime.now(UTC)), "wall_s": wall_s}
            self.results["wall_s"] = round(sum(each.get("wall_s") or 0 for each in self.sessions), 1)
        with explain_failed_write(self.directory / RUN_FILE, RESUME_HINT):
            own: dict[str, Any] = {"quantization": self.facts.quantization, "rows_per_step": self.facts.rows_per_step}
            own["sessions"] = self.sessions
            write_json(
                self.directory / RUN_FILE, {"program": PROGRAM, **self.values, "status": status, **own, **self.results}
            )

    def write_failure(self, error: BaseException) -> None:
        """Note why a run that had begun failed, where that can be written: the error itself is what to show."""
        if self.status == "running":
            with contextlib.suppress(MachineError):
                self.write(f"failed: {error}")


def read_sessions(directory: Path) -> list[dict[str, Any]]:
    """The sessions that a run's run.json tells of; none where it tells of none."""
    try:
        found = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _write_time(time_: datetime) -> str:
    return time_.isoformat(timespec="seconds")


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl. Raises: MachineError: the disk is full, say."""
    with explain_failed_write(path, RESUME_HINT), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def describe_environment() -> dict[str, Any]:
    """Command, versions, machine and the toolkit's git state."""
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "versions": {name: _find_version(name) for name in (*_PACKAGES, *_OPTIONAL)},
        "machine": platform.platform(),
        "git": _git_state(),
    }


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # an unpacked copy inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
