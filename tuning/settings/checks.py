"""Checks across settings: bounds, what contradicts, and what would have no effect. All mistakes, a line each."""

import importlib.util
import json
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

from tuning.settings.meaning import Meaning, list_meanings
from tuning.settings.options import DataArguments, LoraArguments, ModelArguments, RunOptions, Settings

_NOT_IN_ADAPTER = {"loraplus_lr_ratio"}  # an optimizer setting, so it is allowed with --lora_weight_path
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # of --report_to
_HOLDS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt}
_LARGEST = 2**53  # of whole numbers: beyond it floats and torch's counters no longer hold them
_LARGEST_FLOAT = 1e38  # about the largest of torch's float32


def check_number(name: str, value: Any, meaning: Meaning) -> str | None:
    """What is wrong with the value of one option, if it is a number: it is not finite, or out of its bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return f"--{name} {value}: must be a finite number"
    largest = _LARGEST if isinstance(value, int) else _LARGEST_FLOAT
    if abs(value) > largest:
        return f"--{name} {value}: must be at most {largest:,}"
    all_bounds = [("at least", meaning.at_least), ("above", meaning.above), ("below", meaning.below)]
    bounds = [(word, bound) for word, bound in all_bounds if bound is not None]
    if all(_HOLDS[word](value, bound) for word, bound in bounds):
        return None
    wanted = " and ".join(f"{word} {bound:,}" for word, bound in bounds)
    return f"--{name} {value}: must be {wanted}"


def check_settings(settings: Settings) -> Iterator[str]:
    """Hold all settings against each other. Yields: a line for each mistake."""
    model, data, lora, run = settings
    given = settings.given
    values = {name: value for group in settings for name, value in vars(group).items()}
    for group in settings:
        for name, meaning in list_meanings(group).items():
            if name in given and meaning.needs and not _is_met(meaning.needs, values):
                yield f"--{name}: has no effect without --{meaning.needs.replace('|', ' or ')}"
    yield from _check_lora(lora, model, given)
    yield from _check_new_tokens(data, lora)
    yield from _check_schedule(run)
    yield from _check_run(run, model, given)
    yield from _check_processes(run, given)
    yield from _check_best(run, given)
    yield from _check_evaluation(run, data)
    for pair in data.map or ():
        if not all(part.strip() for part in pair.partition("=")[::2]):
            yield f"--map {pair}: say OURS=THEIRS: role=speaker"
    for name in run.report_to if isinstance(run.report_to, list) else ():
        packages = _PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            yield f"--report_to {name}: {name} is not installed; pip install {name}"


def _is_met(needs: str, values: dict[str, Any]) -> bool:
    name, _, wanted = needs.partition(" ")
    value = values[name]
    if name == "report_to":
        return value not in ("none", [])
    return value in wanted.split("|") if wanted else bool(value)


def _check_lora(lora: LoraArguments, model: ModelArguments, given: frozenset[str]) -> Iterator[str]:
    if lora.q_lora and not lora.use_lora:
        yield "--use_lora False and --q_lora True: only adapters train on a quantised model"
    if lora.bits not in (None, 4, 8):
        yield f"--bits {lora.bits}: must be 4 or 8"
    if lora.q_lora and lora.bits == 8 and lora.quant_type is not None:
        yield f"--quant_type {lora.quant_type}: has no effect with --bits 8"
    if lora.q_lora and lora.use_dora:
        yield "--use_dora and --q_lora: DoRA needs unquantised weights; choose one"
    if lora.use_lora and model.pure_bf16:
        yield "--pure_bf16: has no effect with LoRA, which keeps adapters in fp32"
    if isinstance(lora.lora_target_modules, str):
        try:
            re.compile(lora.lora_target_modules)
        except re.error as error:
            yield f"--lora_target_modules {lora.lora_target_modules}: not a regular expression: {error}"
    if lora.lora_weight_path:
        of_the_adapter = {name for name, each in list_meanings(lora).items() if each.needs == "use_lora"}
        if taken := sorted(given & of_the_adapter - _NOT_IN_ADAPTER - {"lora_weight_path"}):
            yield f"--{taken[0]}: has no effect with --lora_weight_path, whose adapter says it"


def _check_new_tokens(data: DataArguments, lora: LoraArguments) -> Iterator[str]:
    if not data.add_special_tokens:
        return
    if lora.lora_weight_path:
        yield "--add_special_tokens: has no effect with --lora_weight_path, whose adapter brings its tokens along"
    elif lora.use_lora and lora.train_embeddings == "off":
        yield "--add_special_tokens and --train_embeddings off: new tokens would never be learnt; use auto or full"


def _check_run(run: RunOptions, model: ModelArguments, given: frozenset[str]) -> Iterator[str]:
    if model.pure_bf16 and run.fp16:
        yield "--pure_bf16 and --fp16: choose one"
    if "do_train" in given and not run.do_train:
        yield "--do_train False: training is what this program does"
    tokens = run.micro_batch_tokens
    if tokens is not None and tokens != "auto" and not (tokens.isdecimal() and int(tokens) > 0):
        yield f"--micro_batch_tokens {tokens}: say a number of tokens, or auto"
    if run.compile_layers and run.gradient_checkpointing:
        yield "--compile_layers and --gradient_checkpointing: torch would compile nothing; choose one"
    if "output_dir" in given and not run.output_dir:
        yield "--output_dir: must name a directory"
    if "max_steps" in given and "num_train_epochs" in given and run.max_steps > 0:
        yield "--max_steps and --num_train_epochs: choose one; the steps would be all that counts"
    optim = run.optim
    if optim in ("adamw_torch_4bit", "adamw_torch_8bit") and not run.save_only_model:
        yield (
            f"--optim {optim}: its state cannot be saved, so that the run could not be resumed; use adamw_bnb_8bit, or "
            "--save_only_model True"
        )
    if run.resume_from_checkpoint in ("", "True", "true", "False", "false"):
        yield f"--resume_from_checkpoint {run.resume_from_checkpoint}: say auto, or name a checkpoint"
    if run.overwrite_output_dir and run.resume_from_checkpoint is not None:
        yield "--resume_from_checkpoint and --overwrite_output_dir: choose one"


def _check_schedule(run: RunOptions) -> Iterator[str]:
    """lr_scheduler_kwargs are a mapping of names to values; what numbers these are is the schedule's to say."""
    text = run.lr_scheduler_kwargs
    if text is None:
        return
    try:
        found = json.loads(text)
    except ValueError as error:
        yield f"--lr_scheduler_kwargs {text}: not JSON: {error}"
        return
    if not isinstance(found, dict):
        yield f"--lr_scheduler_kwargs {text}: must be names and values: '{{\"min_lr\": 1e-6}}'"
        return
    for name, number in found.items():
        if mistake := check_number(f"lr_scheduler_kwargs {name}", number, Meaning()):
            yield mistake


def _check_processes(run: RunOptions, given: frozenset[str]) -> Iterator[str]:
    if "deepspeed" in given and "fsdp" in given:
        yield "--deepspeed and --fsdp: choose one"
    for name in ("deepspeed", "fsdp"):
        if run.compile_layers and getattr(run, name):
            yield f"--compile_layers: not available with --{name}; leave one out"
    kinds = (run.fsdp or "full_shard").replace("auto_wrap", "").split()
    if "offload" in kinds:
        yield "--fsdp offload: not available; DeepSpeed does it (docs/distributed.md)"
    elif kinds not in (["full_shard"], ["shard_grad_op"]):
        yield f"--fsdp {run.fsdp}: say full_shard or shard_grad_op"


def _check_best(run: RunOptions, given: frozenset[str]) -> Iterator[str]:
    evaluates, saves = run.eval_strategy, run.save_strategy
    metric = run.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in ("loss", "perplexity"):
        yield f"--metric_for_best_model {metric}: evaluation measures loss and perplexity"
    if metric is not None and evaluates == "no":
        yield "--metric_for_best_model: has no effect without --eval_strategy steps or epoch"
    if "greater_is_better" in given and run.greater_is_better:
        yield "--greater_is_better True: of loss and perplexity the lower is the better"
    if saves == "best" and evaluates == "no":
        yield "--save_strategy best: needs --eval_strategy steps or epoch"
    if run.load_best_model_at_end and run.save_only_model:
        yield "--load_best_model_at_end and --save_only_model: the best cannot be loaded; choose one"
    if not run.load_best_model_at_end or saves == "best":
        return
    eval_steps = run.logging_steps if run.eval_steps is None else run.eval_steps
    if evaluates != saves:
        yield (
            f"--load_best_model_at_end: needs --save_strategy ({saves}) equal to --eval_strategy ({evaluates}), so "
            "that the best evaluation is a checkpoint"
        )
    elif evaluates == "steps" and eval_steps != run.save_steps:
        yield (
            f"--load_best_model_at_end: needs --save_steps ({run.save_steps:g}) equal to --eval_steps "
            f"({eval_steps:g}), so that the best evaluation is a checkpoint"
        )


def _check_evaluation(run: RunOptions, data: DataArguments) -> Iterator[str]:
    evaluates = run.eval_strategy != "no" or run.eval_on_start
    if data.eval_data_path and data.eval_share is not None:
        yield "--eval_data_path and --eval_share: choose one"
    if evaluates and not data.eval_data_path and data.eval_share is None:
        yield "--eval_strategy: needs --eval_data_path, or --eval_share 0.05 of the training data"
    for name, given in (
        ("sample_prompts", run.sample_prompts),
        ("eval_data_path", data.eval_data_path),
        ("eval_share", data.eval_share),
    ):
        if given and not evaluates:
            yield f"--{name}: has no effect without --eval_strategy steps or epoch"
