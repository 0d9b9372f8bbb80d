"""Checks across settings: bounds, what contradicts, and what would have no effect."""

import importlib.util
import json
import math
import operator
from dataclasses import fields
from typing import Any

from tuning.errors import SettingsError
from tuning.settings.meaning import Meaning
from tuning.settings.optimizer_checks import check_optimizer
from tuning.settings.options import (
    GROUPS,
    Arguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    list_meanings,
)
from tuning.settings.transformers_options import LATER, OWN_LOOP

_NOT_IN_ADAPTER = {"loraplus_lr_ratio"}  # an optimizer setting, so it is allowed with --lora_weight_path
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # of --report_to
_HOLDS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt}
_LARGEST = 2**53  # of whole numbers: beyond it floats and torch's counters no longer hold them
_LARGEST_FLOAT = 1e38  # about the largest of torch's float32


def check_given(given: dict[str, Any]) -> None:
    """Check what was given before the arguments are built, which reads files that refused options name.

    Raises: SettingsError: an option that would be ignored.
    """
    defaults = {field.name: field.default for group in GROUPS for field in fields(group)}
    for name, meaning in {name: each for group in GROUPS for name, each in list_meanings(group).items()}.items():
        if name in given:
            _check_number(name, given[name], meaning)
        if meaning.refused and name in given and (given[name] or None) != (defaults[name] or None):
            raise SettingsError(f"--{name} {given[name]}: {meaning.refused}")
    if "lr_scheduler_kwargs" in given:
        _check_schedule_arguments(given["lr_scheduler_kwargs"])
    if "deepspeed" in given and "fsdp" in given:
        raise SettingsError("--deepspeed and --fsdp: choose one")
    if "fsdp" in given:
        kinds = str(given["fsdp"]).replace("auto_wrap", "").split()
        if "offload" in kinds:
            raise SettingsError("--fsdp offload: not available; DeepSpeed does it (docs/distributed.md)")
        if kinds not in (["full_shard"], ["shard_grad_op"]):
            raise SettingsError(f"--fsdp {given['fsdp']}: say full_shard or shard_grad_op")


def check_settings(arguments: Arguments, given: set[str]) -> None:
    """Hold all settings against each other. given: names of those that were given, not defaults.

    Raises: SettingsError.
    """
    model, data, lora, run = arguments
    _check_lora(lora, model, given)
    values = {name: value for group in arguments for name, value in vars(group).items()}
    for group in arguments:
        for name, meaning in list_meanings(group).items():
            if name in given and meaning.needs and not _is_met(meaning.needs, values):
                raise SettingsError(f"--{name}: has no effect without --{meaning.needs.replace('|', ' or ')}")
    _check_run(run, model, given)
    _check_best(run, given)
    _check_evaluation(run, data)
    check_optimizer(run, given)
    for name in run.report_to:
        packages = _PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise SettingsError(f"--report_to {name}: {name} is not installed; pip install {name}")


def check_engine(arguments: Arguments) -> None:
    """Hold the engine against the other settings, once DeepSpeed's file was read. Raises: SettingsError."""
    model, _data, lora, run = arguments
    if run.engine in ("single", "ddp"):
        return
    flag = "--deepspeed" if run.deepspeed else "--fsdp"
    config: Any = run.deepspeed or {}
    if run.deepspeed and model.pure_bf16:
        raise SettingsError(
            "--pure_bf16: has no effect with --deepspeed, which keeps fp32 master weights; --bf16 will do"
        )
    if run.fsdp and run.fp16:
        raise SettingsError("--fsdp and --fp16: gradients of shards are not scaled; use --bf16, or --deepspeed")
    if str(run.optim.value) not in ("adamw_torch", "adamw_torch_fused"):
        raise SettingsError(f"--optim {run.optim.value}: {flag} shards its state; use adamw_torch")
    if run.sample_prompts and run.engine in ("zero3", "fsdp"):
        raise SettingsError(
            f"--sample_prompts: no process holds the full model with {flag}; ask checkpoints with chat.py"
        )
    if lora.q_lora and (config.get("data_types") or {}).get("buffer_dtype"):
        raise SettingsError("--deepspeed: data_types.buffer_dtype casts the scales of quantised weights; delete it")
    if lora.q_lora and run.engine == "zero3":
        raise SettingsError(
            "--q_lora and ZeRO-3: it casts and shards quantised weights; use --deepspeed "
            "finetune/ds_config_zero2.json, or --fsdp full_shard, which shards the model, too"
        )


def _check_number(name: str, value: Any, meaning: Meaning) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"--{name} {value}: must be a finite number")
    largest = _LARGEST if isinstance(value, int) else _LARGEST_FLOAT
    if isinstance(value, (int, float)) and abs(value) > largest:
        raise SettingsError(f"--{name} {value}: must be at most {largest:,}")
    all_bounds = [("at least", meaning.at_least), ("above", meaning.above), ("below", meaning.below)]
    bounds = [(word, bound) for word, bound in all_bounds if bound is not None]
    if isinstance(value, (int, float)) and not all(_HOLDS[word](value, bound) for word, bound in bounds):
        wanted = " and ".join(f"{word} {bound:,}" for word, bound in bounds)
        raise SettingsError(f"--{name} {value}: must be {wanted}")


def _check_schedule_arguments(value: Any) -> None:
    """lr_scheduler_kwargs are a mapping of names to values; what numbers these are is the schedule's to say."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise SettingsError(f"--lr_scheduler_kwargs {value}: not JSON: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise SettingsError(f"--lr_scheduler_kwargs {value}: must be names and values: '{{\"min_lr\": 1e-6}}'")
    for name, number in (found or {}).items():
        _check_number(f"lr_scheduler_kwargs {name}", number, Meaning())


def _is_met(needs: str, values: dict[str, Any]) -> bool:
    name, _, wanted = needs.partition(" ")
    value = values[name]
    return str(getattr(value, "value", value)) in wanted.split("|") if wanted else bool(value)


def _check_lora(lora: LoraArguments, model: ModelArguments, given: set[str]) -> None:
    if lora.q_lora and not lora.use_lora:
        raise SettingsError("--use_lora False and --q_lora True: only adapters train on a quantised model")
    if lora.bits not in (None, 4, 8):
        raise SettingsError(f"--bits {lora.bits}: must be 4 or 8")
    if lora.q_lora and lora.bits == 8 and lora.quant_type is not None:
        raise SettingsError(f"--quant_type {lora.quant_type}: has no effect with --bits 8")
    if lora.q_lora and lora.use_dora:
        raise SettingsError("--use_dora and --q_lora: DoRA needs unquantised weights; choose one")
    if lora.use_lora and model.pure_bf16:
        raise SettingsError("--pure_bf16: has no effect with LoRA, which keeps adapters in fp32")
    if lora.lora_weight_path:
        of_the_adapter = {name for name, each in list_meanings(lora).items() if each.needs == "use_lora"}
        if taken := sorted(given & of_the_adapter - _NOT_IN_ADAPTER - {"lora_weight_path"}):
            raise SettingsError(f"--{taken[0]}: has no effect with --lora_weight_path, whose adapter says it")


def _check_run(run: RunArguments, model: ModelArguments, given: set[str]) -> None:
    if model.pure_bf16 and run.fp16:
        raise SettingsError("--pure_bf16 and --fp16: choose one")
    if run.fp16 and run.use_cpu:
        raise SettingsError("--fp16: needs a GPU; use fp32 (no flag) or --bf16 on a CPU")
    if "do_train" in given and not run.do_train:
        raise SettingsError("--do_train False: training is what this program does")
    if str(run.lr_scheduler_type.value) in ("reduce_lr_on_plateau", "greedy"):
        raise SettingsError(f"--lr_scheduler_type {run.lr_scheduler_type.value}: {LATER}")
    tokens = run.micro_batch_tokens
    if tokens is not None and tokens != "auto" and not (tokens.isdecimal() and int(tokens) > 0):
        raise SettingsError(f"--micro_batch_tokens {tokens}: say a number of tokens, or auto")
    if not run.output_dir:
        raise SettingsError("--output_dir: must name a directory")
    if "max_steps" in given and "num_train_epochs" in given and run.max_steps > 0:
        raise SettingsError("--max_steps and --num_train_epochs: choose one; the steps would be all that counts")
    optim = str(run.optim.value)
    if any(word in optim for word in ("layerwise", "lomo")):
        raise SettingsError(f"--optim {optim}: steps inside the backward pass; {OWN_LOOP}")
    if optim.startswith("paged_") and run.use_cpu:
        raise SettingsError(f"--optim {optim}: moves its state between GPU and host; on a CPU use adamw_8bit")
    if "schedule_free" in optim:
        raise SettingsError(f"--optim {optim}: {LATER}")
    if optim in ("adamw_torch_4bit", "adamw_torch_8bit") and not run.save_only_model:
        raise SettingsError(
            f"--optim {optim}: its state cannot be saved, so that the run could not be resumed; use adamw_bnb_8bit, or "
            "--save_only_model True"
        )
    if run.resume_from_checkpoint in ("", "True", "true", "False", "false"):
        raise SettingsError(f"--resume_from_checkpoint {run.resume_from_checkpoint}: say auto, or name a checkpoint")
    if run.overwrite_output_dir and run.resume_from_checkpoint is not None:
        raise SettingsError("--resume_from_checkpoint and --overwrite_output_dir: choose one")


def _check_best(run: RunArguments, given: set[str]) -> None:
    evaluates, saves = str(run.eval_strategy.value), str(run.save_strategy.value)
    metric = run.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in ("loss", "perplexity"):
        raise SettingsError(f"--metric_for_best_model {metric}: evaluation measures loss and perplexity")
    if metric is not None and evaluates == "no":
        raise SettingsError("--metric_for_best_model: has no effect without --eval_strategy steps or epoch")
    if "greater_is_better" in given and run.greater_is_better:
        raise SettingsError("--greater_is_better True: of loss and perplexity the lower is the better")
    if saves == "best" and evaluates == "no":
        raise SettingsError("--save_strategy best: needs --eval_strategy steps or epoch")
    if run.load_best_model_at_end and run.save_only_model:
        raise SettingsError("--load_best_model_at_end and --save_only_model: the best cannot be loaded; choose one")
    unequal = evaluates == "steps" and saves == "steps" and run.eval_steps != run.save_steps
    if run.load_best_model_at_end and unequal:
        raise SettingsError(
            f"--load_best_model_at_end: needs --save_steps ({run.save_steps}) equal to --eval_steps "
            f"({run.eval_steps}), so that the best evaluation is a checkpoint"
        )


def _check_evaluation(run: RunArguments, data: DataArguments) -> None:
    evaluates = str(run.eval_strategy.value) != "no" or run.eval_on_start
    if evaluates and not data.eval_data_path:
        raise SettingsError("--eval_strategy: needs --eval_data_path")
    if run.sample_prompts and not evaluates:
        raise SettingsError("--sample_prompts: has no effect without --eval_strategy steps or epoch")
    if data.eval_data_path and not evaluates:
        raise SettingsError("--eval_data_path: has no effect without --eval_strategy steps or epoch")
