"""Checks across settings: what contradicts, and what would have no effect."""

import importlib.util
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from tuning.errors import SettingsError
from tuning.settings.options import Arguments, DataArguments, LoraArguments, ModelArguments, RunArguments
from tuning.settings.transformers_options import FIELDS, HONOURED, LATER, OWN_LOOP

_LORA_FIELDS = {declared.name for declared in fields(LoraArguments)}


_MODEL_FIELDS = {"use_lora", "q_lora", "bits", "quant_type"}  # of the model that adapters are on


_RATES = {"loraplus_lr_ratio"}  # of the optimizer, not of the adapter


def check_settings(arguments: Arguments, given: set[str]) -> None:
    """Hold all settings against each other. given: names of those that were said, not defaults.

    Raises: SettingsError.
    """
    _check_lora(arguments.lora, arguments.model, given)
    _check_engine(arguments.run, arguments.model)
    config: Any = arguments.run.deepspeed or {}
    if arguments.lora.q_lora and (config.get("data_types") or {}).get("buffer_dtype"):
        raise SettingsError("--deepspeed: data_types.buffer_dtype casts the scales of packed weights; delete it")
    if arguments.lora.q_lora and arguments.run.engine == "zero3":
        raise SettingsError(
            "--q_lora and ZeRO-3: it casts and cuts packed weights; use --deepspeed finetune/ds_config_zero2.json, or "
            "--fsdp full_shard, which spreads the model, too"
        )
    _check_run(arguments.run, arguments.model, arguments.data, given)
    _check_evaluation(arguments.run, arguments.data, given)
    _check_transformers_settings(arguments.run)


def _check_transformers_settings(run: RunArguments) -> None:
    # TrainingArguments fills some fields in by itself; what a run without the setting gets is the default.
    default = TrainingArguments(output_dir=run.output_dir, use_cpu=run.use_cpu)
    for name in (declared.name for declared in fields(TrainingArguments)):
        reason = FIELDS.get(name, "not known to this version of the toolkit")
        if reason != HONOURED and str(getattr(run, name)) != str(getattr(default, name)):
            raise SettingsError(f"--{name} {getattr(run, name)}: {reason}")


def _check_lora(lora: LoraArguments, model: ModelArguments, given: set[str]) -> None:
    _check_quantization(lora)
    if not lora.use_lora:
        void = sorted(given & (_LORA_FIELDS - _MODEL_FIELDS))
        if void:
            raise SettingsError(f"--{void[0]}: has no effect without --use_lora")
    elif lora.lora_weight_path and (
        taken := sorted(given & (_LORA_FIELDS - {"lora_weight_path"} - _MODEL_FIELDS - _RATES))
    ):
        raise SettingsError(f"--{taken[0]}: has no effect with --lora_weight_path, whose adapter says it")
    elif model.pure_bf16:
        raise SettingsError("--pure_bf16: has no effect with LoRA, which keeps adapters in fp32")
    if lora.lora_r < 1:
        raise SettingsError(f"--lora_r {lora.lora_r}: must be at least 1")
    if lora.lora_alpha <= 0:
        raise SettingsError(f"--lora_alpha {lora.lora_alpha}: must be above 0")
    if lora.loraplus_lr_ratio is not None and not lora.loraplus_lr_ratio > 0:
        raise SettingsError(f"--loraplus_lr_ratio {lora.loraplus_lr_ratio}: must be above 0")
    if not 0 <= lora.lora_dropout < 1:
        raise SettingsError(f"--lora_dropout {lora.lora_dropout}: must be at least 0 and below 1")


def _check_quantization(lora: LoraArguments) -> None:
    for name in ("bits", "quant_type"):
        if getattr(lora, name) is not None and not lora.q_lora:
            raise SettingsError(f"--{name}: has no effect without --q_lora")
    if lora.bits not in (None, 4, 8):
        raise SettingsError(f"--bits {lora.bits}: must be 4 or 8")
    if lora.bits == 8 and lora.quant_type is not None:
        raise SettingsError(f"--quant_type {lora.quant_type}: has no effect with --bits 8")
    if lora.q_lora and lora.use_dora:
        raise SettingsError("--use_dora and --q_lora: DoRA needs whole weights; choose one")


def _check_plan(run: RunArguments) -> None:
    tokens = run.micro_batch_tokens
    if tokens is not None and tokens != "auto" and not (tokens.isdecimal() and int(tokens) > 0):
        raise SettingsError(f"--micro_batch_tokens {tokens}: say a number of tokens, or auto")
    if run.device_memory_gib is not None and not run.device_memory_gib > 0:
        raise SettingsError(f"--device_memory_gib {run.device_memory_gib}: must be above 0")


def _check_engine(run: RunArguments, model: ModelArguments) -> None:
    flag = "--deepspeed" if run.deepspeed else "--fsdp"
    if run.engine in ("single", "ddp"):
        return
    if run.deepspeed and model.pure_bf16:
        raise SettingsError(
            "--pure_bf16: has no effect with --deepspeed, which keeps fp32 master weights; --bf16 will do"
        )
    if run.fsdp and run.fp16:
        raise SettingsError("--fsdp and --fp16: gradients in shards are not scaled; use --bf16, or --deepspeed")
    if str(run.optim.value) not in ("adamw_torch", "adamw_torch_fused"):
        raise SettingsError(f"--optim {run.optim.value}: {flag} cuts its state into pieces; use adamw_torch")
    if run.sample_prompts and run.engine in ("zero3", "fsdp"):
        raise SettingsError(f"--sample_prompts: no process holds a whole model with {flag}; ask checkpoints by chat.py")


def _check_run(run: RunArguments, model: ModelArguments, data: DataArguments, given: set[str]) -> None:
    if model.pure_bf16 and run.fp16:
        raise SettingsError("--pure_bf16 and --fp16: choose one")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(run, name) < 1:
            raise SettingsError(f"--{name} {getattr(run, name)}: must be at least 1")
    if not 0 < run.learning_rate < float("inf"):
        raise SettingsError(f"--learning_rate {run.learning_rate}: must be a number above 0")
    if run.fp16 and run.use_cpu:
        raise SettingsError("--fp16: needs a GPU; use fp32 (no flag) or --bf16 on a CPU")
    if "do_train" in given and not run.do_train:
        raise SettingsError("--do_train False: training is what this program does")
    if run.save_total_limit is not None and run.save_total_limit < 1:
        raise SettingsError(f"--save_total_limit {run.save_total_limit}: must be at least 1")
    if str(run.lr_scheduler_type.value) in ("reduce_lr_on_plateau", "greedy"):
        raise SettingsError(f"--lr_scheduler_type {run.lr_scheduler_type.value}: {LATER}")
    _check_plan(run)
    if run.save_steps <= 0 or run.logging_steps <= 0:
        raise SettingsError("--save_steps and --logging_steps: must be above 0")
    if not run.output_dir:
        raise SettingsError("--output_dir: must name a directory")
    if data.model_max_length < 2:
        raise SettingsError(f"--model_max_length {data.model_max_length}: must be at least 2")
    if run.num_train_epochs <= 0 and run.max_steps <= 0:
        raise SettingsError(f"--num_train_epochs {run.num_train_epochs}: must be above 0")
    optim = str(run.optim.value)
    if any(word in optim for word in ("layerwise", "lomo")):
        raise SettingsError(f"--optim {optim}: steps inside the backward pass, which {OWN_LOOP}")
    if optim.startswith("paged_") and run.use_cpu:
        raise SettingsError(f"--optim {optim}: moves its state between GPU and host; on a CPU use adamw_8bit")
    if "schedule_free" in optim:
        raise SettingsError(f"--optim {optim}: {LATER}")
    if optim in ("adamw_torch_4bit", "adamw_torch_8bit") and not run.save_only_model:
        raise SettingsError(
            f"--optim {optim}: its state cannot be saved, so that training could not go on; use adamw_bnb_8bit, or "
            "--save_only_model True"
        )
    if run.resume_from_checkpoint in ("", "True", "true", "False", "false"):
        raise SettingsError(f"--resume_from_checkpoint {run.resume_from_checkpoint}: say auto, or name a checkpoint")
    if run.force_resume and run.resume_from_checkpoint is None:
        raise SettingsError("--force_resume: has no effect without --resume_from_checkpoint")
    if run.overwrite_output_dir and run.resume_from_checkpoint is not None:
        raise SettingsError("--resume_from_checkpoint and --overwrite_output_dir: choose one")
    _check_best(run, given)


def _check_best(run: RunArguments, given: set[str]) -> None:
    evaluates, saves = str(run.eval_strategy.value), str(run.save_strategy.value)
    metric = run.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in ("loss", "perplexity"):
        raise SettingsError(f"--metric_for_best_model {metric}: what is measured is loss and perplexity")
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


def _check_evaluation(run: RunArguments, data: DataArguments, given: set[str]) -> None:
    evaluates = str(run.eval_strategy.value) != "no" or run.eval_on_start
    if evaluates and not data.eval_data_path:
        raise SettingsError("--eval_strategy: needs --eval_data_path")
    if "eval_steps" in given and str(run.eval_strategy.value) != "steps":
        raise SettingsError("--eval_steps: has no effect without --eval_strategy steps")
    if run.sample_prompts and not evaluates:
        raise SettingsError("--sample_prompts: has no effect without --eval_strategy steps or epoch")
    if "sample_max_new_tokens" in given and not run.sample_prompts:
        raise SettingsError("--sample_max_new_tokens: has no effect without --sample_prompts")
    if data.eval_data_path and not evaluates:
        raise SettingsError("--eval_data_path: has no effect without --eval_strategy steps or epoch")


def check_reporters(names: list[str]) -> None:
    """Raises: SettingsError: --report_to names something that is not installed."""
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in names:
        choices = packages.get(name, ())
        if choices and not any(importlib.util.find_spec(package) for package in choices):
            raise SettingsError(f"--report_to {name}: {name} is not installed; pip install {name}")
