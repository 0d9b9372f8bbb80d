"""What in a directory is of this program, and the only place that writes results into one or deletes any of it.

Ours are: a run whose run.json says so, and files that a manifest of ours names. All other files stay. Symbolic links
are never followed. A result is written in .unfinished.tmp and moved when it is whole:

    .unfinished.tmp/   what is being written, with the owner's mark; its manifest is written last
    .withdrawn.tmp     the manifest of what is being replaced or deleted, so that its files are still known as ours
    config.json        moved last and deleted first: without it nothing loads the directory
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tuning.checkpoint.files import fsync_directory, write_json
from tuning.checkpoint.manifest import MANIFEST_FILE, read_manifest
from tuning.checkpoint.run_record import METRICS_FILE, PROGRAM, RUN_FILE
from tuning.console import say
from tuning.errors import SettingsError, explain_failed_write

PLAN_FILE = "plan.json"  # of a dry run; a run may begin beside it
_RECORDS = (RUN_FILE, METRICS_FILE, MANIFEST_FILE, PLAN_FILE, "dropped.jsonl", "loss.png")
_CONFIGURATIONS = ("config.json", "adapter_config.json")  # what loaders look for first
UNFINISHED = ".unfinished.tmp"
_WITHDRAWN = ".withdrawn.tmp"
_MARK = ".written_by.json"
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
    """Whether a directory is a checkpoint or a result that this program wrote, or began to write or to delete."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    return bool(_own_names(directory)) or _is_begun(directory / UNFINISHED)


def list_checkpoints(directory: Path) -> list[Path]:
    """checkpoint-N directories, oldest step first, whoever wrote them."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.partition("-")[2])


def find_foreign(directory: Path) -> Path | None:
    """What a run cannot write beside: another's weights, configuration or link in the place of its own, or None."""
    for path in list_checkpoints(directory):
        if path.is_symlink():
            return path
    unfinished = directory / UNFINISHED
    if os.path.lexists(unfinished) and not _is_begun(unfinished):
        return unfinished
    own = _own_names(directory)
    return next((path for path in _list_result(directory) if path.name not in own), None)


def is_leftover(path: Path) -> bool:
    """Whether a path is what an interrupted write of ours left."""
    if path.is_symlink():
        return False
    if path.name == UNFINISHED:
        return _is_begun(path)
    if path.name == _WITHDRAWN:
        return bool(_own_names(path.parent))
    named = re.fullmatch(r"\.(.+)\.tmp", path.name)
    return bool(named) and path.is_file() and named is not None and named.group(1) in _RECORDS


def delete_run(directory: Path) -> None:
    """Delete a run of ours but for run.json, which the next one replaces, and all that is not ours."""
    for path in list_checkpoints(directory):
        delete_checkpoint(path)
    _delete_result(directory)
    records = [directory / name for name in _RECORDS if name not in (RUN_FILE, MANIFEST_FILE)]  # ours is gone by now
    for path in [*records, *filter(is_leftover, directory.iterdir())]:
        path.unlink(missing_ok=True)


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint of ours, however far it was written or deleted; what others put into it stays."""
    if is_ours(directory):
        with contextlib.suppress(OSError):
            _delete_result(directory)
    if directory.is_dir() and not directory.is_symlink():
        with contextlib.suppress(OSError):  # it holds what others put there
            directory.rmdir()


def withdraw(directory: Path) -> None:
    """Take the manifest off a result that is about to be replaced or deleted: it is not complete any more."""
    if _names_in(directory / MANIFEST_FILE):
        _delete_withdrawn(directory, but=_names_in(directory / MANIFEST_FILE))
        (directory / MANIFEST_FILE).replace(directory / _WITHDRAWN)


def begin_result(directory: Path, work: str = "") -> Path:
    """Make the directory, UNFINISHED in the other, in which a result is written until it is whole.

    work: what is being written, where it can go on after a kill: the directory of the same work is kept as it is.

    Raises: SettingsError: another's file has its name.
    """
    unfinished = directory / UNFINISHED
    if os.path.lexists(unfinished) and not _is_begun(unfinished):
        raise SettingsError(f"{unfinished}: was not written by this program; move it")
    if _moved_names(directory):  # its files stand in no other manifest
        publish_result(directory)
    if work and _read_work(unfinished) == work:
        return unfinished
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_json(unfinished / _MARK, {"program": PROGRAM, "work": work})
    return unfinished


def _read_work(unfinished: Path) -> str | None:
    try:
        return str(json.loads((unfinished / _MARK).read_text(encoding="utf-8"))["work"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def abandon_result(directory: Path) -> None:
    """Leave a result that could not be written; an earlier one stays, and one that is being moved can be finished."""
    unfinished = directory / UNFINISHED
    if _is_begun(unfinished) and not _moved_names(directory):
        shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds an earlier result, or what others put there
        directory.rmdir()


def publish_result(directory: Path) -> None:
    """Move a result from where begin_result had it written, its manifest included, to the place of the earlier one.

    What others put there under the same name gets another name. An interrupted move goes on when this is called again.

    Raises: SettingsError: there is no whole result to move; nothing is changed then.
    """
    unfinished = directory / UNFINISHED
    if not (sealed := _names_in(unfinished / MANIFEST_FILE)):
        raise SettingsError(f"{unfinished}: holds no whole result; did another command write there?")
    new = sealed - {MANIFEST_FILE}
    withdraw(directory)
    old = _names_in(directory / _WITHDRAWN)
    for name in filter(_CONFIGURATIONS.__contains__, old):
        (directory / name).unlink(missing_ok=True)
    for name in sorted(new, key=_CONFIGURATIONS.__contains__):
        if name in _CONFIGURATIONS:
            _delete_withdrawn(directory, but=new)
        if (unfinished / name).exists():  # else it was moved before an interruption
            target = directory / name
            if os.path.lexists(target) and name not in old:
                _keep(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).replace(target)
    _delete_withdrawn(directory, but=new)
    fsync_directory(directory)
    if os.path.lexists(directory / MANIFEST_FILE):  # ours was withdrawn
        _keep(directory / MANIFEST_FILE)
    (unfinished / MANIFEST_FILE).replace(directory / MANIFEST_FILE)
    fsync_directory(directory)
    shutil.rmtree(unfinished, ignore_errors=True)


def finish_interrupted(out: Path) -> None:
    """Publish a whole result whose move was interrupted. Raises: SettingsError: another process writes there."""
    if not _is_interrupted(out):
        return
    lock(out)
    if _is_interrupted(out):  # still, now that nobody else moves it
        say(f"{out}: was written before, and interrupted at the very end; it is complete now")
        publish_result(out)


def _is_interrupted(out: Path) -> bool:
    return _is_begun(out / UNFINISHED) and bool(_names_in(out / UNFINISHED / MANIFEST_FILE))


@contextlib.contextmanager
def new_result(
    out: Path, then: str = "run the command again", check: Callable[[], None] = lambda: None, work: str = ""
) -> Iterator[Path]:
    """A directory to write a result into, its manifest last; then it takes the place of OUT's earlier result.

    Until then OUT holds no model that could be loaded, or the earlier one. After an error it is as it was before.
    then: what to do after a failed write, when its cause is gone. check: whether OUT may be written to, once no other
    process can. work: as begin_result has it.

    Raises: MachineError: it could not be written.
    """
    absent = [path for path in (out, *out.parents) if not path.exists()]
    with explain_failed_write(out, then):
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        check()
        unfinished = begin_result(out, work)
        try:
            yield unfinished
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            for path in absent:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
        publish_result(out)


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


def _is_begun(path: Path) -> bool:
    """Whether a directory is one of begin_result's, be it that it was killed before its mark was written or after."""
    if path.is_symlink() or not path.is_dir():
        return False
    files = {each.name for each in path.rglob("*") if each.is_symlink() or not each.is_dir()}
    return (path / _MARK).is_file() or files <= {f".{_MARK}.tmp"}


def _own_names(directory: Path) -> set[str]:
    """Names of the files of a result or checkpoint, and of one that it replaces; its manifests included."""
    return _names_in(directory / MANIFEST_FILE) | _names_in(directory / _WITHDRAWN) | _moved_names(directory)


def _moved_names(directory: Path) -> set[str]:
    """Names of files that publish_result had moved when it was interrupted."""
    unfinished = directory / UNFINISHED
    if unfinished.is_symlink():
        return set()
    sealed = _names_in(unfinished / MANIFEST_FILE) - {MANIFEST_FILE}
    return {name for name in sealed if not (unfinished / name).exists() and _lies_within(directory, name)}


def _names_in(manifest: Path) -> set[str]:
    """Names that a manifest of ours has and its own, relative to its directory; empty if it is none."""
    if manifest.is_symlink():
        return set()
    try:
        names = read_manifest(manifest.parent, manifest.name)["files"]
    except (OSError, ValueError, KeyError):
        return set()
    return {manifest.name, *(name for name in names if _lies_within(manifest.parent, name))}


def _lies_within(directory: Path, name: str) -> bool:
    """Whether a relative name stays in the directory, without a link on the way to it."""
    path = Path(name)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts != ()
    return inside and not any((directory / parent).is_symlink() for parent in [*path.parents][:-1])


def _list_result(directory: Path) -> list[Path]:
    """Weights and configurations in a directory."""
    patterns = ("*.safetensors", "*.safetensors.index.json", *_CONFIGURATIONS, "generation_config.json")
    return [path for pattern in patterns for path in sorted(directory.glob(pattern))]


def _delete_result(directory: Path) -> None:
    """Delete the files of a result, so that none is loaded on the way, and what was begun in its place."""
    withdraw(directory)
    _delete_withdrawn(directory, but=set())
    if _is_begun(directory / UNFINISHED):
        _delete_files(directory, _moved_names(directory))
        shutil.rmtree(directory / UNFINISHED)


def _delete_withdrawn(directory: Path, *, but: set[str]) -> None:
    """Delete the files of a withdrawn manifest, configurations first, and it at the end; not those in but."""
    old = _names_in(directory / _WITHDRAWN)
    _delete_files(directory, old - but - {_WITHDRAWN})
    if old:
        (directory / _WITHDRAWN).unlink(missing_ok=True)


def _delete_files(directory: Path, names: set[str]) -> None:
    for name in sorted(names, key=lambda name: name not in _CONFIGURATIONS):
        (directory / name).unlink(missing_ok=True)
        for parent in [*Path(name).parents][:-1]:
            with contextlib.suppress(OSError):  # absent, or not empty
                (directory / parent).rmdir()


def _keep(path: Path) -> None:
    """Give another's file a name at which nothing stands."""
    names = (path.with_name(f"{path.name}.kept{number or ''}") for number in range(10**6))
    kept = next(name for name in names if not os.path.lexists(name))
    path.rename(kept)
    say(f"{path}: was not written by this program; it is {kept.name} now")
