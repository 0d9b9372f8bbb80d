"""DeepSpeed's JSON: read, held against the command line, and filled from it."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tuning.errors import SettingsError

# Whole blocks that would override a setting, or be ignored.
_REFUSED = {
    "optimizer": "--optim {optim} builds the optimizer",
    "scheduler": "--lr_scheduler_type {lr_scheduler_type} says the learning rate",
    "amp": "--bf16 and --fp16 say the precision",
    "torch_autocast": "--bf16 and --fp16 say the precision",
    "activation_checkpointing": "--gradient_checkpointing says it",
    "tensor_parallel": "each process holds whole layers here",
    "checkpoint": "checkpoints are the toolkit's own",
    "curriculum_learning": "the order of the data follows from --seed",
    "data_efficiency": "the order of the data follows from --seed",
}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_deepspeed_config(path: str, settings: TrainingArguments) -> dict[str, Any]:
    """The configuration that DeepSpeed gets, with a step of this toolkit as one micro-batch of its own.

    settings: need not be initialised yet; only what the command line said is read.

    Raises: SettingsError: no such file, no JSON, no ZeRO stage, or a value that contradicts the command line.
    """
    config = _read_json(path)
    for name, reason in _REFUSED.items():
        if name in config:
            kind = config[name].get("type", "block") if isinstance(config[name], dict) else config[name]
            says = reason.format(optim=_plain(settings.optim), lr_scheduler_type=_plain(settings.lr_scheduler_type))
            raise SettingsError(f"--deepspeed {path}: {name} {kind}, but {says}; delete it from the file")
    stage = _find(config, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise SettingsError(
            f"--deepspeed {path}: zero_optimization.stage {stage}: must be 1, 2 or 3; without sharding leave "
            "--deepspeed out"
        )
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = {
        "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size", settings.per_device_train_batch_size),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", settings.gradient_accumulation_steps),
        "train_batch_size": ("batch x accumulation x processes", rows * processes),
        "gradient_clipping": ("--max_grad_norm", settings.max_grad_norm),
        "bf16.enabled": ("--bf16", bool(settings.bf16)),
        "fp16.enabled": ("--fp16", bool(settings.fp16)),
    }
    for key, (flag, value) in wanted.items():
        there = _find(config, key)
        if there not in (None, "auto", value):
            raise SettingsError(
                f'--deepspeed {path}: {key} {json.dumps(there)}, but {flag} is {json.dumps(value)}; write "auto" there'
            )
    # How many micro-batches a step has is the layout's business; to DeepSpeed each step is one.
    config |= dict.fromkeys(_BATCH, "auto")
    for block in ("bf16", "fp16"):
        config[block] = {**config.get(block, {}), "enabled": "auto"}
    config["gradient_clipping"] = settings.max_grad_norm
    return config


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--deepspeed {path}: {error.strerror}") from None
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise SettingsError(f"--deepspeed {path}{line}: not valid JSON") from None
    if not isinstance(config, dict):
        raise SettingsError(f"--deepspeed {path}: expected an object")
    return config


def _find(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
