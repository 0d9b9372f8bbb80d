"""What in a directory is of this program, and the only place that deletes any of it.

Ours are: a run whose run.json says so, files that a manifest of ours names, and checkpoints and results that carry the
owner's mark, which is written before anything else. All other files stay. Symbolic links are never followed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tuning.checkpoint.files import write_json
from tuning.checkpoint.manifest import MANIFEST_FILE, read_manifest
from tuning.checkpoint.run_record import METRICS_FILE, PROGRAM, RUN_FILE
from tuning.errors import SettingsError

OWNER_FILE = "written_by.json"
PLAN_FILE = "plan.json"  # of a dry run; a run may begin beside it
_RECORDS = (RUN_FILE, METRICS_FILE, MANIFEST_FILE, PLAN_FILE, OWNER_FILE, "dropped.jsonl", "loss.png")
_CONFIGURATIONS = ("config.json", "adapter_config.json", "generation_config.json")
_UNFINISHED = ".unfinished.tmp"
_OLD_KEYS = {"status", "settings", "versions"}  # of run.json before it named its program
_locks: dict[Path, int] = {}  # file descriptors, open as long as the process writes there


def is_run(directory: Path) -> bool:
    """Whether a directory's run.json was written by this program."""
    path = directory / RUN_FILE
    if path.is_symlink():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and (record.get("program") == PROGRAM or record.keys() >= _OLD_KEYS)


def is_ours(directory: Path) -> bool:
    """Whether a directory is a checkpoint or a result that this program wrote, or began to write."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    return (directory / OWNER_FILE).is_file() or _names_in_manifest(directory) is not None


def list_checkpoints(directory: Path) -> list[Path]:
    """checkpoint-N directories, oldest step first, whoever wrote them."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.partition("-")[2])


def find_foreign(directory: Path) -> Path | None:
    """What a run would write over or delete here, though another made it; None if there is nothing of that kind."""
    for path in list_checkpoints(directory):
        if not is_ours(path):
            return path
    return next((path for path in _list_result(directory) if path not in _list_own_result(directory)), None)


def is_leftover(path: Path) -> bool:
    """Whether a path is what an interrupted write of ours left."""
    if path.is_symlink():
        return False
    if path.name == _UNFINISHED:
        return is_ours(path)
    named = re.fullmatch(r"\.(.+)\.tmp", path.name)
    return bool(named) and path.is_file() and named is not None and named.group(1) in (*_RECORDS, *_CONFIGURATIONS)


def mark(directory: Path) -> None:
    """Write the owner's mark, before anything else is written there."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / OWNER_FILE, {"program": PROGRAM})


def delete_run(directory: Path) -> None:
    """Delete a run of ours but for run.json, which the next one replaces, and all that is not ours."""
    ours = [directory / name for name in _RECORDS if name != RUN_FILE]
    for path in [*_list_own_result(directory), *ours, *filter(is_leftover, directory.iterdir())]:
        _delete(path)
    for path in filter(is_ours, list_checkpoints(directory)):
        delete_checkpoint(path)


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint of ours, its manifest first: an interrupted deletion leaves nothing that looks complete."""
    if not is_ours(directory):
        return
    with contextlib.suppress(OSError):
        mark(directory)  # older ones are told by their manifest alone
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def new_result(out: Path) -> Iterator[Path]:
    """A directory inside OUT to write a result into; its files take the place of OUT's earlier result at the end.

    Until then OUT holds no model that could be loaded, or the earlier one. After an error it is as it was before.
    """
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        unfinished = out / _UNFINISHED
        if is_ours(unfinished):
            shutil.rmtree(unfinished)
        mark(unfinished)
    except OSError as error:
        raise SettingsError(f"{out}: cannot be written to: {error.strerror}") from None
    try:
        yield unfinished
        for name in _names_in_manifest(out) or ():
            _delete(out / name)
        files = sorted(unfinished.rglob("*"), key=lambda path: path.name == MANIFEST_FILE)  # the manifest last
        for path in filter(Path.is_file, files):
            target = out / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # it holds the result
                out.rmdir()


def lock(directory: Path) -> None:
    """Hold a directory for this process, until it ends.

    Raises: SettingsError: another process writes there.
    """
    directory = directory.resolve()
    if directory in _locks:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SettingsError(f"{directory}: another process is writing there; wait for it, or choose another") from None
    except OSError:  # a file system without locks
        pass
    _locks[directory] = descriptor


def _names_in_manifest(directory: Path) -> list[str] | None:
    """Names of the files of a result or checkpoint, the manifest first; None if it has none of ours."""
    if (directory / MANIFEST_FILE).is_symlink():
        return None
    try:
        files = read_manifest(directory)["files"]
    except (OSError, ValueError, KeyError):
        return None
    return [MANIFEST_FILE, *(name for name in files if Path(name).name == name)]


def _list_result(directory: Path) -> list[Path]:
    """Weights and configurations in a directory."""
    patterns = ("*.safetensors", "*.safetensors.index.json", *_CONFIGURATIONS)
    return [path for pattern in patterns for path in sorted(directory.glob(pattern))]


def _list_own_result(directory: Path) -> list[Path]:
    named = _names_in_manifest(directory)
    # A save that was interrupted left the mark and no manifest; nothing of another's was here when it began.
    begun = named is None and (directory / OWNER_FILE).is_file() and not (directory / MANIFEST_FILE).exists()
    return [path for path in _list_result(directory) if begun or path.name in (named or ())]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
