"""DeepSpeed's JSON: read, compared with the command line, and completed from it."""

import difflib
import json
import os
from pathlib import Path
from typing import Any

from tuning.errors import SettingsError
from tuning.settings.meaning import list_meanings

# Whole blocks that would override a setting, or be ignored.
_REFUSED = {
    "optimizer": "--optim {optim} builds the optimizer",
    "scheduler": "--lr_scheduler_type {lr_scheduler_type} says the learning rate",
    "amp": "--bf16 and --fp16 say the precision",
    "torch_autocast": "--bf16 and --fp16 say the precision",
    "activation_checkpointing": "--gradient_checkpointing says it",
    "tensor_parallel": "layers are not split over processes here",
    "checkpoint": "checkpoints are the toolkit's own",
    "curriculum_learning": "the order of the data follows from --seed",
    "data_efficiency": "the order of the data follows from --seed",
}

# Allowed top-level keys. DeepSpeed itself ignores unknown keys without a word, so they are refused here.
_KNOWN = {
    "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "gradient_clipping",
    "gradient_predivide_factor", "prescale_gradients", "sparse_gradients", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "seed", "aio", "comms_logger", "flops_profiler", "tensorboard", "wandb",
    "csv_monitor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip

# Of zero_optimization: other ways to shard weights than those that sharding.py gathers.
_OTHER_SHARDS = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "mics_shard_size", "zenflow",
)  # fmt: skip

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_deepspeed_config(path: str, settings: Any) -> dict[str, Any]:
    """DeepSpeed's configuration, completed from the command line: gradient accumulation is 1 as far as DeepSpeed knows.

    Raises: SettingsError: no such file, no JSON, no ZeRO stage, or a value that contradicts the command line.
    """
    config = _read_json(path)
    for name, reason in _REFUSED.items():
        if name in config:
            kind = config[name].get("type", "block") if isinstance(config[name], dict) else config[name]
            says = reason.format(optim=_plain(settings.optim), lr_scheduler_type=_plain(settings.lr_scheduler_type))
            raise SettingsError(f"--deepspeed {path}: {name} {kind}, but {says}; delete it from the file")
    if unknown := sorted(config.keys() - _KNOWN):
        close = difflib.get_close_matches(unknown[0], _KNOWN, n=1)
        hint = f"did you mean {close[0]}?" if close else "delete it from the file"
        raise SettingsError(f"--deepspeed {path}: {unknown[0]}: unknown, or not supported here; {hint}")
    _check_zero(path, config.get("zero_optimization"))
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    wanted: dict[str, tuple[str, Any]] = {
        meaning.deepspeed: (f"--{name}", getattr(settings, name))
        for name, meaning in list_meanings(settings).items()
        if meaning.deepspeed
    }
    wanted["train_batch_size"] = ("batch x accumulation x processes", rows * processes)
    for key, (flag, value) in wanted.items():
        there = _find(config, key)
        if there not in (None, "auto", value):
            raise SettingsError(
                f'--deepspeed {path}: {key} {json.dumps(there)}, but {flag} is {json.dumps(value)}; write "auto" there'
            )
    # The batch layout says how many micro-batches a step has; to DeepSpeed each step is one.
    config |= dict.fromkeys(_BATCH, "auto")
    for block in ("bf16", "fp16"):
        if not isinstance(config.get(block, {}), dict):
            raise SettingsError(f"--deepspeed {path}: {block}: expected an object")
        config[block] = {**config.get(block, {}), "enabled": "auto"}
    config["gradient_clipping"] = settings.max_grad_norm
    return config


def _check_zero(path: str, zero: Any) -> None:
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else None
        says = "is missing" if stage is None else f"{stage}"
        raise SettingsError(
            f"--deepspeed {path}: zero_optimization.stage {says}: must be 1, 2 or 3; without sharding leave "
            "--deepspeed out"
        )
    if other := [
        name for name in _OTHER_SHARDS if zero.get(name) is True or zero.get(name) not in (None, False, 1, -1)
    ]:
        raise SettingsError(f"--deepspeed {path}: zero_optimization.{other[0]}: not supported; delete it")
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(name) or {}, dict):
            raise SettingsError(
                f'--deepspeed {path}: zero_optimization.{name}: expected an object: {{"device": "cpu"}}'
            )
        if (zero.get(name) or {}).get("device") == "nvme":
            raise SettingsError(f"--deepspeed {path}: zero_optimization.{name}.device nvme: not supported; say cpu")
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError:  # start_processes says so
        return
    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise SettingsError(f"--deepspeed {path}: {place}: {first['msg']}") from None


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
