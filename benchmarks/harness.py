"""What every benchmark does: an arm in a fresh process, and what a result says of where it was measured."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any


def run_arm(arm: str, script: str, words: Sequence[str]) -> dict[str, Any]:
    """Run `script ... --arm ARM`, which prints its figures as the last line of JSON. Exits where it fails."""
    done = subprocess.run([sys.executable, script, *words, "--arm", arm], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
