"""What a run was and what it measured: run.json, metrics.jsonl, and the manifest of what it saved."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuning.errors import SettingsError

RUN_FILE, METRICS_FILE, MANIFEST_FILE = "run.json", "metrics.jsonl", "manifest.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one go: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def describe_environment() -> dict[str, Any]:
    """Command, versions, machine and the toolkit's git state."""
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": platform.platform(),
        "git": _git_state(),
    }


def check_manifest(directory: Path, names: list[str]) -> None:
    """Hold files against the manifest of their directory, where it has one.

    Raises: SettingsError: a run without its manifest (the save was not finished), or a file that is not as saved.
    """
    manifest = directory / MANIFEST_FILE
    if not manifest.is_file():
        if (directory / RUN_FILE).is_file():
            raise SettingsError(
                f"{directory}: has no {MANIFEST_FILE}, so the run did not finish or its save was cut short"
            )
        return  # not of this toolkit
    listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    for name in names:
        path = directory / name
        if name in listed and (not path.is_file() or _hash(path) != listed[name]["sha256"]):
            raise SettingsError(f"{path}: is not the file that was saved (by {MANIFEST_FILE}); copy it again")


def write_manifest(directory: Path, *, step: int | None = None, base_model: dict[str, str] | None = None) -> None:
    """Write the list of a directory's files with sizes and hashes, after they are on disk."""
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST_FILE):
        path.chmod(0o666 & ~umask)  # safetensors writes for the owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    write_json(directory / MANIFEST_FILE, {"step": step, "base_model": base_model, "files": files})


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
