"""Directories that are written to: what may stand there, what is deleted, which checkpoints there are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuning.checkpoint.files import replace_file, write_json
from tuning.checkpoint.manifest import MANIFEST_FILE, read_manifest
from tuning.checkpoint.ownership import (
    PLAN_FILE,
    delete_checkpoint,
    delete_run,
    find_foreign,
    finish_interrupted,
    is_leftover,
    is_ours,
    is_run,
    list_checkpoints,
    lock,
    step_of,
    withdraw,
)
from tuning.checkpoint.run_record import METRICS_FILE, RUN_FILE
from tuning.errors import SettingsError


def check_run_directory(arguments: Any) -> None:
    """Refuse an --output_dir that holds anything but an earlier run that may be deleted or resumed.

    arguments: Settings, or Arguments.

    Raises: SettingsError.
    """
    run = arguments.run
    directory, wanted = Path(run.output_dir), run.resume_from_checkpoint
    resumes = wanted is not None and (
        wanted == "auto" or lies_in(Path(wanted), directory) or not _holds_results(directory)
    )
    data = arguments.data
    files = [name.partition("#")[0] for name in [*data.data_path, *(data.eval_data_path or [])]]
    others = [
        arguments.model.model_name_or_path,
        arguments.lora.lora_weight_path,
        data.chat_template,
        run.sample_prompts,
    ]
    inputs = filter(None, [*others, *files])
    if holder := next((path for path in inputs if lies_in(Path(path), directory)), None):
        raise SettingsError(f"--output_dir {directory}: {holder} is an input of this run; choose another directory")
    _check_writable(directory, "--output_dir")
    found = [p.name for p in directory.iterdir() if not is_leftover(p)] if directory.exists() else []
    found = [name for name in found if name != PLAN_FILE]
    if not found:
        return
    if not is_run(directory):
        raise SettingsError(
            f"--output_dir {directory}: is not empty ({found[0]}) and holds no run of this program; choose another "
            "directory"
        )
    if foreign := find_foreign(directory):
        raise SettingsError(
            f"--output_dir {directory}: {foreign.name} in it was not written by this program (no {MANIFEST_FILE} of "
            "its own names it); move it, or choose another directory"
        )
    if not (run.overwrite_output_dir or run.dry_run or resumes):
        raise SettingsError(
            f"--output_dir {directory}: holds another run ({RUN_FILE}); choose another directory, or resume that run "
            "with --resume_from_checkpoint auto, or delete it with --overwrite_output_dir"
        )


def check_result_directory(out: Path, inputs: list[Path], *, overwrite: bool, mark: str) -> None:
    """Refuse an OUT of merge_lora.py or quantize.py that holds anything but an earlier result that may be deleted.

    mark: what the manifests of such results have, and no others.

    Raises: SettingsError.
    """
    if holder := next((path for path in inputs if lies_in(path, out)), None):
        raise SettingsError(f"{out}: {holder} is an input; choose another directory")
    _check_writable(out, "OUT")
    finish_interrupted(out)
    if out.exists() and (not out.is_dir() or not all(map(is_leftover, out.iterdir()))):
        if not overwrite:
            raise SettingsError(f"{out}: exists and is not empty; choose another directory, or use --overwrite")
        if not is_ours(out) or mark not in _read_facts(out):
            raise SettingsError(
                f"{out}: is no result of this program, so --overwrite does not delete it; choose another directory"
            )


def _read_facts(out: Path) -> dict[str, Any]:
    try:
        return read_manifest(out)
    except (OSError, ValueError):
        return {}


def _holds_results(directory: Path) -> bool:
    """Whether a complete result or checkpoint may be in a directory."""
    return any((path / MANIFEST_FILE).is_file() for path in (directory, *list_checkpoints(directory)))


def _check_writable(directory: Path, flag: str) -> None:
    """Raises: SettingsError: no directory can be made or written to there."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise SettingsError(
            f"{flag} {directory}: {'' if existing == directory.absolute() else f'{existing} '}is a file"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"{flag} {directory}: cannot be written to ({existing} is read-only)")


def lies_in(path: Path, directory: Path) -> bool:
    """Whether path is the directory or something inside it."""
    return directory.resolve() in (path.resolve(), *path.resolve().parents)


def prepare_output_directory(
    directory: Path, checkpoint: Path | None, check: Callable[[], None] = lambda: None
) -> None:
    """Make the directory; continue the metrics of a checkpoint, or delete an earlier run. Anything else in it stays.

    check: whether a run may begin there, once no other process can.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock(directory)
        if checkpoint is not None:
            withdraw(directory)  # what is there is about to be replaced
            metrics = checkpoint / METRICS_FILE
            replace_file(directory / METRICS_FILE, metrics.read_bytes() if metrics.exists() else b"")
    except OSError as error:
        raise SettingsError(f"--output_dir {directory}: cannot be written to: {error.strerror}") from None
    if checkpoint is None:
        check()
        delete_run(directory)


def rotate_checkpoints(newest: Path, limit: int | None, *, keep: Path | None) -> None:
    """Delete the checkpoints beyond a limit, and what is left of incomplete ones.

    newest: what was just saved, and is complete. Later ones stay: the run skipped them when it was resumed.
    keep: a checkpoint that stays whatever its age.
    """
    if limit is None:
        return
    ours = filter(is_ours, list_checkpoints(newest.parent))
    until_now = [path for path in ours if step_of(path) <= step_of(newest)]
    complete = [path for path in until_now if (path / MANIFEST_FILE).is_file()]
    kept = {path.resolve() for path in [*complete[-limit:], *([keep] if keep else [])]}
    for path in until_now:
        if path.resolve() not in kept:
            delete_checkpoint(path)


def write_plan(directory: Path, plan: dict[str, Any]) -> Path:
    """Write plan.json, beside which a run may begin."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN_FILE, plan)
    return directory / PLAN_FILE
