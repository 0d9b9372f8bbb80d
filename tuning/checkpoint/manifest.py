"""The manifest of a directory: its files with sizes and hashes, written last. With a valid one it is complete."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuning.checkpoint.files import fsync_directory, write_json
from tuning.checkpoint.run_record import RUN_FILE
from tuning.errors import SettingsError

MANIFEST_FILE = "manifest.json"


def check_manifest(directory: Path, names: list[str]) -> None:
    """Compare files with the manifest of their directory, where it has one.

    Raises: SettingsError: a run without its manifest (the save was not finished), or a file that is not as saved.
    """
    if not (directory / MANIFEST_FILE).is_file() and not (directory / RUN_FILE).is_file():
        return  # not of this toolkit
    if fault := find_fault(directory, names):
        raise SettingsError(f"{directory}: {fault}")


def find_fault(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """Why a directory is not what was saved there, or None if it is.

    names: the files to compare; all of it if None, so that None says: complete, to the byte.
    """
    try:
        listed = read_manifest(directory)["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST_FILE}, so the run did not finish or its save was interrupted"
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


def write_manifest(directory: Path, known: Mapping[str, dict[str, Any]] | None = None, **facts: Any) -> None:
    """Write the list of a directory's files with sizes and hashes, after they are on disk. facts go with it.

    known: sizes and hashes of files that were hashed while they were written. Hidden files (the owner's mark) are not
    of it.
    """
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(path for path in directory.rglob("[!.]*") if path.is_file() and path.name != MANIFEST_FILE):
        with contextlib.suppress(OSError):  # some file systems have no modes
            path.chmod(0o666 & ~umask)  # safetensors writes for the owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(directory).as_posix()
        files[name] = (known or {}).get(name) or {"bytes": path.stat().st_size, "sha256": _hash(path)}
    fsync_directory(directory)
    manifest = {**facts, "files": files}
    write_json(directory / MANIFEST_FILE, {**manifest, "sha256": _hash_json(manifest)})
    fsync_directory(directory.parent)


def read_manifest(directory: Path, name: str = MANIFEST_FILE) -> dict[str, Any]:
    """Raises: FileNotFoundError: there is none. SettingsError: it is not as it was written."""
    try:
        manifest = json.loads((directory / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _hash_json(manifest):
        raise SettingsError(
            f"{directory / name}: is damaged; copy it again (another program's file of that name: move it away)"
        )
    return manifest


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
