"""What a run was and what it measured: run.json, metrics.jsonl, and the manifest of what it saved."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tuning.errors import MachineError, SettingsError
from tuning.stopping import GO_ON

RUN_FILE, METRICS_FILE, MANIFEST_FILE = "run.json", "metrics.jsonl", "manifest.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
_OPTIONAL = ("deepspeed", "bitsandbytes", "gptqmodel")  # part of some runs; None where not installed


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one go: a reader sees the old file or the new one, also after a power cut."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Give a file its content in one go."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def write_run(directory: Path, run: dict[str, Any]) -> None:
    """Write run.json. Raises: MachineError: the disk is full, say."""
    with explain_failed_write(directory / RUN_FILE, GO_ON):
        write_json(directory / RUN_FILE, run)


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl. Raises: MachineError: the disk is full, say."""
    with explain_failed_write(path, GO_ON), open(path, "a", encoding="utf-8") as file:
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


def check_manifest(directory: Path, names: list[str]) -> None:
    """Hold files against the manifest of their directory, where it has one.

    Raises: SettingsError: a run without its manifest (the save was not finished), or a file that is not as saved.
    """
    if not (directory / MANIFEST_FILE).is_file() and not (directory / RUN_FILE).is_file():
        return  # not of this toolkit
    if fault := find_fault(directory, names):
        raise SettingsError(f"{directory}: {fault}")


def find_fault(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """Why a directory is not what was saved there, or None if it is.

    names: the files to hold against the manifest; all of it if None, so that None says: complete, to the byte.
    """
    try:
        listed = read_manifest(directory)["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST_FILE}, so the run did not finish or its save was cut short"
    except ValueError:
        return f"{MANIFEST_FILE} is damaged"
    except OSError as error:
        return f"{MANIFEST_FILE} cannot be read: {error.strerror}"
    for name, saved in listed.items():
        path = directory / name
        if names is not None and name not in names:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != saved["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of the {saved['bytes']:,} that were saved"
        if _hash(path) != saved["sha256"]:
            return f"{name} is not the file that was saved (by {MANIFEST_FILE}); copy it again"
    return None


def write_manifest(directory: Path, **facts: Any) -> None:
    """Write the list of a directory's files with sizes and hashes, after they are on disk. facts go with it."""
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST_FILE):
        with contextlib.suppress(OSError):  # some file systems have no modes
            path.chmod(0o666 & ~umask)  # safetensors writes for the owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    _fsync_directory(directory)
    manifest = {**facts, "files": files}
    write_json(directory / MANIFEST_FILE, {**manifest, "sha256": _hash_json(manifest)})
    _fsync_directory(directory.parent)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises: FileNotFoundError: there is none. ValueError: it is not as it was written."""
    manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _hash_json(manifest):
        raise ValueError(f"{directory / MANIFEST_FILE}: damaged")
    return manifest


@contextlib.contextmanager
def explain_failed_write(path: Path, then: str) -> Iterator[None]:
    """Turn the failures of a write (a full disk, a directory that became read-only) into one line.

    then: what to do when the cause is gone.

    Raises: MachineError.
    """
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers raise errors of their own, with the system's inside.
        if not isinstance(error, OSError) and "os error" not in str(error) and "IoError" not in str(error):
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        why = re.sub(r".*error: | \(os error \d+\)", "", text, flags=re.IGNORECASE)
        full = any(words in why for words in ("No space left", "File too large", "quota"))
        remedy = "make room" if full else "make it writable"
        raise MachineError(f"{path}: could not be written: {why}; {remedy}, then {then}") from error


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
