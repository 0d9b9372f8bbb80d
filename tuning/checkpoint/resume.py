"""Where a run goes on: which checkpoint, why not another one, and whether it is one of the same run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.checkpoint.adapter import read_adapter_config
from tuning.checkpoint.manifest import MANIFEST_FILE, find_fault, read_manifest
from tuning.checkpoint.output_directory import list_checkpoints, step_of
from tuning.checkpoint.training_state import STATE_FILE
from tuning.errors import SettingsError
from tuning.model.quantization import Quantization
from tuning.settings.options import Arguments, describe_settings

# Settings that change what is computed. Others (how often to log, where rows lie in memory) may change on the way.
_MATTERS = {
    "model": ["pure_bf16"],
    "data": ["model_max_length", "system_message", "label_mask", "chat_template_kwargs", "supervise", "on_long"],
    "lora": [
        "use_lora", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias", "use_dora",
        "use_rslora", "loraplus_lr_ratio", "train_embeddings",
    ],
    "run": [
        "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
        "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16",
        "fp16", "tf32", "seed", "data_seed", "load_best_model_at_end",
    ],
}  # fmt: skip


@dataclass
class StartingPoint:
    """Where a run begins.

    checkpoint: to go on from; None is the beginning.
    rows_per_step: of the checkpoint, which wins over the settings; None at the beginning.
    finished: there is nothing to do. notes: lines for the log.
    """

    checkpoint: Path | None = None
    rows_per_step: int | None = None
    finished: bool = False
    notes: list[str] = field(default_factory=list)


def describe_trajectory(
    arguments: Arguments,
    *,
    base_fingerprint: str,
    rows_fingerprint: str,
    files: list[dict[str, Any]],
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """What the weights after each step follow from, as JSON values; rows per step aside.

    Raises: SettingsError: --lora_weight_path is no adapter.
    """
    settings = describe_settings(arguments)
    chosen = {name: settings[group][name] for group, names in _MATTERS.items() for name in names}
    if arguments.lora.lora_weight_path is not None:  # rank, scale and dropout are its own, weights the checkpoint's
        adapter = Path(arguments.lora.lora_weight_path)
        read_adapter_config(adapter)  # there, and what it should be
        chosen["lora_weight_path"] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    data = {Path(str(file["path"])).name: str(file["sha256"])[:12] for file in files}
    trajectory = {**chosen, "base model": base_fingerprint[:12], "data": data, "tokenised rows": rows_fingerprint[:12]}
    trajectory["quantization"] = quantization.to_json() if quantization else None
    return json.loads(json.dumps(trajectory))


def find_starting_point(wanted: str | None, output_dir: Path, facts: dict[str, Any], *, force: bool) -> StartingPoint:
    """Choose where to begin.

    wanted: --resume_from_checkpoint: None, "auto" or a checkpoint directory.
    facts: of this run, as its manifests will have them: trajectory, versions, layout.

    Raises: SettingsError: no such checkpoint, a damaged one, or one of another run and not force.
    """
    if wanted is None:
        return StartingPoint()
    start = _newest(output_dir) if wanted == "auto" else _named(Path(wanted), output_dir)
    if wanted == "auto" and (output_dir / MANIFEST_FILE).is_file():
        if fault := _find_damaged_weights(output_dir):
            start.notes.append(f"passed over the result in {output_dir}: {fault}")
        else:
            manifest = read_manifest(output_dir)
            if not _check_changes(output_dir, manifest, facts, force=force and start.checkpoint is not None):
                line = f"{output_dir}: this run is finished ({manifest['step']:,} steps); there is nothing to do"
                return StartingPoint(finished=True, notes=[line])
    if start.checkpoint is None:
        if (output_dir / MANIFEST_FILE).is_file() or any(not find_fault(path) for path in list_checkpoints(output_dir)):
            raise SettingsError(
                f"{output_dir}: holds results, but nothing to go on from ({'; '.join(start.notes)}); choose another "
                "--output_dir, or delete them with --overwrite_output_dir"
            )
        start.notes.append(f"no complete checkpoint in {output_dir}: starting from the beginning")
        return start
    manifest = read_manifest(start.checkpoint)
    changes = _check_changes(start.checkpoint, manifest, facts, force=force)
    start.rows_per_step = manifest["rows_per_step"]
    start.notes.append(f"going on from {start.checkpoint}; {start.rows_per_step:,} rows a step, as there")
    start.notes += [f"  in spite of: {change}" for change in changes]
    if other := list_changes(manifest["versions"], facts["versions"]):
        start.notes.append(f"  other versions: {'; '.join(other)}: the same run, but not to the bit")
    if other := list_changes(manifest["layout"], facts["layout"]):
        start.notes.append(f"  {'; '.join(other)}: the same run up to rounding, but for dropout's random numbers")
    return start


def _check_changes(directory: Path, manifest: dict[str, Any], facts: dict[str, Any], *, force: bool) -> list[str]:
    changes = list_changes(manifest["trajectory"], facts["trajectory"])
    if changes and not force:
        raise SettingsError(
            f"{directory}: is of another run: {'; '.join(changes)}. Give it what it had, choose another --output_dir, "
            "or go on from a checkpoint all the same with --force_resume True"
        )
    return changes


def list_changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two trajectories, one line each."""
    return [
        f"{name} {_show(here.get(name))} (there {_show(there.get(name))})"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]


def _newest(output_dir: Path) -> StartingPoint:
    start = StartingPoint()
    for path in reversed(list_checkpoints(output_dir)):
        if fault := _find_fault(path):
            start.notes.append(f"passed over {path}: {fault}")
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
            "go on from auto, or choose another --output_dir"
        )
    return StartingPoint(checkpoint=path)


def _find_damaged_weights(result: Path) -> str | None:
    """The rest of a result may have been changed on purpose: its generation config, say."""
    try:
        return find_fault(result, [name for name in read_manifest(result)["files"] if name.endswith(".safetensors")])
    except ValueError:
        return find_fault(result)


def _find_fault(checkpoint: Path) -> str | None:
    fault = find_fault(checkpoint)
    if fault is None and not (checkpoint / STATE_FILE).is_file():
        return f"has no {STATE_FILE} (--save_only_model), so that training cannot go on from it"
    return fault


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
