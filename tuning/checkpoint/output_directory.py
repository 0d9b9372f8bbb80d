"""Directories that are written to: what may stand there, what is deleted, which checkpoints there are."""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from tuning.checkpoint.files import replace_file, write_json
from tuning.checkpoint.manifest import MANIFEST_FILE, read_manifest
from tuning.checkpoint.run_record import METRICS_FILE, RUN_FILE
from tuning.errors import SettingsError
from tuning.settings.options import Arguments

PLAN_FILE = "plan.json"  # of a dry run; a run may begin beside it

# Not run.json: the new one takes its place, so that a directory never holds files of a run without it.
_RUN_FILES = (MANIFEST_FILE, METRICS_FILE, PLAN_FILE, "adapter_config.json", "config.json")


def check_run_directory(arguments: Arguments) -> None:
    """Refuse an --output_dir that holds anything but an earlier run that may be deleted or resumed.

    Raises: SettingsError.
    """
    run = arguments.run
    directory, wanted = Path(run.output_dir), run.resume_from_checkpoint
    resumes = wanted is not None and (
        wanted == "auto" or lies_in(Path(wanted), directory) or not _holds_results(directory)
    )
    inputs = filter(None, (arguments.model.model_name_or_path, arguments.lora.lora_weight_path))
    if holder := next((path for path in inputs if lies_in(Path(path), directory)), None):
        raise SettingsError(f"--output_dir {directory}: {holder} is an input of this run; choose another directory")
    _check_writable(directory, "--output_dir")
    found = [p.name for p in directory.iterdir() if not _is_temporary(p)] if directory.exists() else []
    found = [name for name in found if name != PLAN_FILE]
    if not found:
        return
    if not (directory / RUN_FILE).is_file():
        raise SettingsError(
            f"--output_dir {directory}: is not empty ({found[0]}) and holds no run; choose another directory"
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise SettingsError(f"{out}: exists and is not empty; choose another directory, or use --overwrite")
        if not (out / MANIFEST_FILE).is_file() or mark not in read_manifest(out):
            raise SettingsError(
                f"{out}: is no result of this program, so --overwrite does not delete it; choose another directory"
            )


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


def prepare_output_directory(directory: Path, checkpoint: Path | None) -> None:
    """Make the directory; continue the metrics of a checkpoint, or delete an earlier run. Anything else in it stays."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            (directory / MANIFEST_FILE).unlink(missing_ok=True)  # what is there is about to be replaced
            metrics = checkpoint / METRICS_FILE
            replace_file(directory / METRICS_FILE, metrics.read_bytes() if metrics.exists() else b"")
    except OSError as error:
        raise SettingsError(f"--output_dir {directory}: cannot be written to: {error.strerror}") from None
    if checkpoint is not None:
        return
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]
    for path in [*_run_files(directory), *weights, *filter(_is_temporary, directory.iterdir())]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """checkpoint-N directories, oldest step first."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.partition("-")[2])


def rotate_checkpoints(newest: Path, limit: int | None, *, keep: Path | None) -> None:
    """Delete the checkpoints beyond a limit, and what is left of incomplete ones.

    newest: what was just saved, and is complete. Later ones stay: the run skipped them when it was resumed.
    keep: a checkpoint that stays whatever its age.
    """
    if limit is None:
        return
    until_now = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    complete = [path for path in until_now if (path / MANIFEST_FILE).is_file()]
    kept = {path.resolve() for path in [*complete[-limit:], *([keep] if keep else [])]}
    for path in until_now:
        if path.resolve() not in kept:
            remove_checkpoint(path)


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, its manifest first: an interrupted deletion leaves nothing that looks complete."""
    with contextlib.suppress(OSError):
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _run_files(directory: Path) -> list[Path]:
    named = [directory / name for name in _RUN_FILES if (directory / name).exists()]
    return named + list_checkpoints(directory)


def write_plan(directory: Path, plan: dict[str, Any]) -> Path:
    """Write plan.json, beside which a run may begin."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN_FILE, plan)
    return directory / PLAN_FILE
