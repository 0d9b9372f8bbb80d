"""Where a run starts: at the beginning, from which checkpoint, or not at all since it is finished."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.checkpoint.base import BaseModel
from tuning.checkpoint.manifest import MANIFEST_FILE, find_fault, read_manifest
from tuning.checkpoint.ownership import list_checkpoints, step_of
from tuning.checkpoint.run_record import RunFacts
from tuning.checkpoint.training_state import STATE_FILE
from tuning.errors import SettingsError, read_json_object
from tuning.settings.arguments import Arguments, RunArguments, describe_trajectory_settings


@dataclass
class StartingPoint:
    """Where a run begins.

    checkpoint: to resume from; None is the beginning.
    rows_per_step: conversations of a step in the checkpoint, which win over the settings; None at the beginning.
    finished: there is nothing to do. notes: lines for the log.
    """

    checkpoint: Path | None = None
    rows_per_step: int | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)


def describe_facts(
    arguments: Arguments, base: BaseModel, environment: dict[str, Any], account: Any, max_tokens: int
) -> RunFacts:
    """What the manifests of a run say of it. account: of its data. max_tokens: of a micro-batch."""
    run, quantization = arguments.run, base.quantization.to_json() if base.quantization else None
    chosen = describe_trajectory_settings(arguments)
    if base.adapter is not None:  # rank, scale and dropout are its own, weights the checkpoint's
        config = base.adapter.directory / "adapter_config.json"
        chosen["lora_weight_path"] = read_json_object(config)
    trajectory = {
        **chosen,
        "base model": base.fingerprint[:12],
        "data": {Path(str(file["path"])).name: _name_data(file) for file in account.files},
        "tokenised rows": account.fingerprint[:12],
        "quantization": quantization,
    }
    return RunFacts(
        trajectory=json.loads(json.dumps(trajectory)),  # as manifests give it back
        layout={
            "processes": run.world_size,
            "batch": run.per_device_train_batch_size,
            "engine": run.engine,
            "micro_batch_tokens": max_tokens,
        },
        command=environment["command"],
        versions=environment["versions"],
        quantization=quantization,
    )


def _name_data(file: dict[str, Any]) -> str:
    weight = file.get("weight", 1)
    return str(file["sha256"])[:12] + ("" if weight == 1 else f"*{weight:g}")


def find_starting_point(run: RunArguments, facts: RunFacts) -> StartingPoint:
    """Choose where to begin.

    run: --resume_from_checkpoint (none, auto or a checkpoint directory), --output_dir and --force_resume.
    facts: of this run, as its manifests will have them.

    Raises: SettingsError: no such checkpoint, a damaged one, or one of another run and not force.
    """
    wanted, output_dir, force = run.resume_from_checkpoint, Path(run.output_dir), run.force_resume
    if wanted is None:
        return StartingPoint()
    start = _newest(output_dir) if wanted == "auto" else _named(Path(wanted), output_dir)
    if wanted == "auto" and (output_dir / MANIFEST_FILE).is_file():
        if fault := _find_damaged_weights(output_dir):
            start.notes.append(f"skipped the result in {output_dir}: {fault}")
        else:
            manifest = read_manifest(output_dir)
            if not _check_changes(output_dir, manifest, facts, force=force and start.checkpoint is not None):
                line = f"{output_dir}: this run is finished ({manifest['step']:,} steps); there is nothing to do"
                return StartingPoint(finished=True, notes=[line])
    if start.checkpoint is None:
        if any((path / MANIFEST_FILE).is_file() for path in (output_dir, *list_checkpoints(output_dir))):
            raise SettingsError(
                f"{output_dir}: holds results, but no checkpoint to resume from ({'; '.join(start.notes)}); put back "
                "what changed, choose another --output_dir, or delete them with --overwrite_output_dir"
            )
        start.notes.append(f"no complete checkpoint in {output_dir}: starting from the beginning")
        return start
    manifest = read_manifest(start.checkpoint)
    changes = _check_changes(start.checkpoint, manifest, facts, force=force)
    start.rows_per_step = manifest["rows_per_step"]
    start.notes.append(f"resuming from {start.checkpoint}; {start.rows_per_step:,} conversations a step, as there")
    start.notes += [f"  changed since the checkpoint: {change}" for change in changes]
    if other := list_changes(manifest["versions"], facts.versions):
        start.notes.append(f"  changed since the checkpoint: {'; '.join(other)}; the same run, but not bit for bit")
    if other := list_changes(manifest["layout"], facts.layout):
        start.notes.append(
            f"  changed since the checkpoint: {'; '.join(other)}; the same run up to rounding and dropout"
        )
    return start


def _check_changes(directory: Path, manifest: dict[str, Any], facts: RunFacts, *, force: bool) -> list[str]:
    changes = list_changes(manifest["trajectory"], facts.trajectory)
    if changes and not force:
        raise SettingsError(
            f"{directory}: belongs to another run; changed since then: {'; '.join(changes)}. Set what it had, choose "
            "another --output_dir, or resume from a checkpoint with the changes with --force_resume True"
        )
    return changes


def list_changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two descriptions, there -> here, one line each."""
    return [
        f"{name} {_show(there.get(name))} -> {_show(here.get(name))}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]


def _newest(output_dir: Path) -> StartingPoint:
    start = StartingPoint()
    for path in reversed(list_checkpoints(output_dir)):
        if fault := _find_fault(path):
            start.notes.append(f"skipped {path}: {fault}")
        else:
            start.checkpoint = path
            break
    return start


def _named(path: Path, output_dir: Path) -> StartingPoint:
    if not path.is_dir():
        raise SettingsError(f"--resume_from_checkpoint {path}: no such directory")
    if not (path / STATE_FILE).is_file() and (inside := list_checkpoints(path)):
        raise SettingsError(f"--resume_from_checkpoint {path}: is a run, not a checkpoint; name {inside[-1]}, say")
    if fault := _find_fault(path):
        raise SettingsError(f"--resume_from_checkpoint {path}: {fault}")
    step = read_manifest(path)["step"]
    later = [p for p in list_checkpoints(output_dir) if step_of(p) > step and not _find_fault(p)]
    if later:
        raise SettingsError(
            f"--resume_from_checkpoint {path}: {output_dir} holds later checkpoints ({later[0].name}); delete them, "
            "use --resume_from_checkpoint auto, or choose another --output_dir"
        )
    return StartingPoint(checkpoint=path)


def _find_damaged_weights(result: Path) -> str | None:
    """What is wrong with a result's weights, or None. Other files (generation config) may be edited on purpose."""
    try:
        return find_fault(result, [name for name in read_manifest(result)["files"] if name.endswith(".safetensors")])
    except ValueError:
        return find_fault(result)


def _find_fault(checkpoint: Path) -> str | None:
    fault = find_fault(checkpoint)
    if fault is None and not (checkpoint / STATE_FILE).is_file():
        return f"has no {STATE_FILE}: it cannot be resumed (--save_only_model)"
    return fault


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def check_best(directory: Path) -> None:
    """Raises: SettingsError: the checkpoint of the best evaluation is not as it was saved."""
    if fault := find_fault(directory):
        raise SettingsError(
            f"--load_best_model_at_end: {directory}, the best so far: {fault}; put it back, or leave the flag out"
        )
