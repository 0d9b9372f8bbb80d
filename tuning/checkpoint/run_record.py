"""What a run was and what it measured: run.json and metrics.jsonl."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuning.checkpoint.files import write_json
from tuning.errors import explain_failed_write
from tuning.messages import RESUME_HINT

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"


_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


_OPTIONAL = ("deepspeed", "bitsandbytes", "gptqmodel")  # part of some runs; None where not installed


def write_run(directory: Path, run: dict[str, Any]) -> None:
    """Write run.json. Raises: MachineError: the disk is full, say."""
    with explain_failed_write(directory / RUN_FILE, RESUME_HINT):
        write_json(directory / RUN_FILE, run)


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
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # an unpacked copy inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
