"""Settings: one declaration each, what transformers' own settings mean here, and the checks across them."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tuning.deepspeed_config import read_deepspeed_config
from tuning.errors import SettingsError
from tuning.processes import join_for_deepspeed
from tuning.settings_file import read_settings_file
from tuning.transformers_settings import FIELDS, HONOURED, LATER, OWN_LOOP


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "checkpoint directory or hub name"})
    cache_dir: str | None = field(default=None, metadata={"help": "where hub downloads and tokenised data are kept"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that comes with the checkpoint"})
    allow_pickle: bool = field(default=False, metadata={"help": "read .bin weights (they can run code when loaded)"})
    pure_bf16: bool = field(
        default=False, metadata={"help": "full training with bf16 weights and optimizer states (default: fp32 ones)"}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = field(metadata={"help": "training data: files, FILE#N (a sample of N rows), directories"})
    eval_data_path: list[str] | None = field(default=None, metadata={"help": "conversations to evaluate on"})
    model_max_length: int = field(
        default=2048, metadata={"help": "tokens a row may have; longer ones lose whole turns"}
    )
    system_message: str | None = field(default=None, metadata={"help": "system turn for conversations without one"})
    label_mask: Literal["assistant", "qwen"] = field(
        default="assistant", metadata={"help": "trained tokens: the answers, or those of the original Qwen recipe"}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "file with a chat template (jinja) to train with and to save with the result"}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "defaults for the template, as JSON: '{\"enable_thinking\": false}'"}
    )
    data_format: Literal["conversations", "messages", "alpaca", "prompt", "text"] | None = field(
        default=None, metadata={"help": "format of the rows (default: told by each row's keys)"}
    )
    supervise: Literal["all", "last"] = field(default="all", metadata={"help": "assistant turns to train"})
    on_bad_row: Literal["error", "skip"] = field(
        default="error", metadata={"help": "list all bad rows and stop, or count them and go on"}
    )
    on_long: Literal["drop_turns", "drop", "error"] = field(
        default="drop_turns",
        metadata={"help": "rows beyond model_max_length lose turns, are left out, or stop the run"},
    )
    no_cache: bool = field(default=False, metadata={"help": "tokenise anew, and keep nothing"})
    lazy_preprocess: bool = field(default=False, metadata={"help": "accepted for older scripts; has no effect"})


@dataclass
class LoraArguments:
    """How it is trained."""

    use_lora: bool = field(default=False, metadata={"help": "train LoRA adapters instead of all weights"})
    q_lora: bool = field(default=False, metadata={"help": "LoRA on a 4-bit model (not available yet)"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "scale: alpha / r (rsLoRA: alpha / sqrt(r))"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters, 0 to 1"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the layers to adapt (default: every linear layer but the output)"}
    )
    lora_weight_path: str | None = field(default=None, metadata={"help": "adapter directory to start from"})
    lora_bias: Literal["none", "all", "lora_only"] = field(default="none", metadata={"help": "biases to train"})
    use_dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA"})
    use_rslora: bool = field(default=False, metadata={"help": "rank-stabilised LoRA"})
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: learning rate of the B matrices over that of the A matrices"}
    )
    train_embeddings: Literal["auto", "tokens", "full", "off"] = field(
        default="auto",
        metadata={
            "help": "embedding and output layer with LoRA: control tokens' rows, whole matrices, or nothing; "
            "auto: rows on a base model, nothing on a chat model"
        },
    )


@dataclass
class RunArguments(TrainingArguments):
    """transformers' settings (transformers_settings.py says what each means here), some with another default."""

    output_dir: str = field(metadata={"help": "directory for the result"})
    logging_steps: float = field(default=1, metadata={"help": "steps between log lines"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step whatever logging_steps is"})
    sample_prompts: str | None = field(
        default=None, metadata={"help": "file with a prompt a line, answered at each evaluation"}
    )
    sample_max_new_tokens: int = field(default=128, metadata={"help": "longest sample answer in tokens"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete the earlier run in output_dir first"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "auto: go on from the newest complete checkpoint in output_dir; or a checkpoint directory"},
    )
    force_resume: bool = field(
        default=False, metadata={"help": "resume in spite of changed data, settings or base model"}
    )
    deepspeed: str | None = field(
        default=None, metadata={"help": "DeepSpeed's JSON: finetune/ds_config_zero2.json, ds_config_zero3.json, yours"}
    )
    fsdp: str | None = field(
        default=None,
        metadata={
            "help": "full_shard: FSDP2 shards weights, gradients and optimizer over the processes; shard_grad_op: the "
            "same, with weights kept whole between forward and backward"
        },
    )

    def __post_init__(self) -> None:
        # To the Trainer a step is one item, whatever it accumulates, and the model comes to it sharded (sharding.py).
        given: Any = self
        accumulation, fsdp = given.gradient_accumulation_steps, given.fsdp
        if self.deepspeed is not None:
            given.deepspeed = read_deepspeed_config(self.deepspeed, self)
            join_for_deepspeed(use_cpu=self.use_cpu)
            self.gradient_accumulation_steps = 1
        self.fsdp = None
        super().__post_init__()
        unset_hf_deepspeed_config()  # from_pretrained would shard at once; here the first process loads it all
        self.gradient_accumulation_steps, self.fsdp = accumulation, fsdp

    @property
    def engine(self) -> Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]:
        """What spreads the work over processes."""
        config: Any = self.deepspeed
        if config is not None:
            return ("zero1", "zero2", "zero3")[config["zero_optimization"]["stage"] - 1]
        if self.fsdp is not None:
            return "fsdp"
        return "ddp" if self.world_size > 1 else "single"


@dataclass
class Arguments:
    """Everything the command line said."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunArguments


# Names that older scripts use, and what they are called now.
ALIASES = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}

_LORA_FIELDS = {declared.name for declared in fields(LoraArguments)}
_RATES = {"loraplus_lr_ratio"}  # of the optimizer, not of the adapter


class OneLineParser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what the entry scripts print."""
        raise SettingsError(f"{message}; see --help")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # HfArgumentParser gives every flag a second spelling with dashes; one name is enough in a message.
        message = re.sub(r"/--[a-z0-9-]+", "", message).removeprefix("argument ")
        raise SettingsError(message.replace("the following arguments are required", "required"))


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check a command line (sys.argv without the program's name if None).

    Raises: SettingsError: unknown, abbreviated, contradicting or void settings.
    """
    original = list(sys.argv[1:] if argv is None else argv)
    file = original[0] if original and original[0].endswith((".yaml", ".yml")) else None
    file_words = read_settings_file(Path(file)) if file else []
    if file:
        original[:1] = file_words
    words = [_expand_alias(word) for word in original]
    classes = (ModelArguments, DataArguments, LoraArguments, RunArguments)
    parser = _Parser(classes, allow_abbrev=False, prog="finetune.py")
    known = {flag for action in parser._actions for flag in action.option_strings}
    try:
        _check_flags([_expand_alias(word) for word in file_words], known)
    except SettingsError as error:
        raise SettingsError(f"{file}: {str(error).replace('--', '')}") from None
    _check_flags(words, known)
    words += _device_defaults(words)
    _check_engine_flags(words)
    try:
        *parsed, stray = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except SettingsError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks
        raise SettingsError(" ".join(str(error).split())) from None
    if stray:
        raise SettingsError(f"{stray[0]}: belongs to no setting; see --help")
    arguments = Arguments(*parsed)
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    if any("warmup_ratio" in word.replace("-", "_") for word in original) and arguments.run.warmup_steps >= 1:
        raise SettingsError(
            f"--warmup_ratio {arguments.run.warmup_steps}: a share of the steps, at least 0 and below 1"
        )
    _check_settings(arguments, given)
    _check_transformers_settings(arguments.run)
    return arguments


def describe_settings(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """All settings as plain JSON values, for run.json."""
    run = arguments.run.to_dict()
    return {"model": vars(arguments.model), "data": vars(arguments.data), "lora": vars(arguments.lora), "run": run}


def _expand_alias(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{ALIASES.get(name, name)}{equals}{value}"


def _check_flags(words: list[str], known: set[str]) -> None:
    for word in words:
        flag = word.partition("=")[0]
        if not word.startswith("--") or flag in known:
            continue
        if flag == "--group_by_length":
            raise SettingsError("--group_by_length: not needed; rows of a step are laid out by length already")
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        prefixed = sorted(name for name in known if name.startswith(flag))
        guess = prefixed[:1] or close
        raise SettingsError(f"{flag}: unknown setting" + (f"; did you mean {guess[0]}?" if guess else "; see --help"))


def _check_transformers_settings(run: RunArguments) -> None:
    # TrainingArguments fills some fields in by itself; what a run without the setting gets is the default.
    default = TrainingArguments(output_dir=run.output_dir, use_cpu=run.use_cpu)
    for name in (declared.name for declared in fields(TrainingArguments)):
        reason = FIELDS.get(name, "not known to this version of the toolkit")
        if reason != HONOURED and str(getattr(run, name)) != str(getattr(default, name)):
            raise SettingsError(f"--{name} {getattr(run, name)}: {reason}")


def _check_settings(arguments: Arguments, given: set[str]) -> None:
    _check_lora(arguments.lora, arguments.model, given)
    _check_engine(arguments.run, arguments.model)
    _check_run(arguments.run, arguments.model, arguments.data, given)
    _check_evaluation(arguments.run, arguments.data, given)


def _check_lora(lora: LoraArguments, model: ModelArguments, given: set[str]) -> None:
    if lora.q_lora:
        raise SettingsError("--q_lora: not available yet; use --use_lora")
    if not lora.use_lora:
        void = sorted(given & (_LORA_FIELDS - {"use_lora", "q_lora"}))
        if void:
            raise SettingsError(f"--{void[0]}: has no effect without --use_lora")
    elif lora.lora_weight_path and (
        taken := sorted(given & (_LORA_FIELDS - {"use_lora", "lora_weight_path"} - _RATES))
    ):
        raise SettingsError(f"--{taken[0]}: has no effect with --lora_weight_path, whose adapter says it")
    elif model.pure_bf16:
        raise SettingsError("--pure_bf16: has no effect with --use_lora, which keeps adapters in fp32")
    if lora.lora_r < 1:
        raise SettingsError(f"--lora_r {lora.lora_r}: must be at least 1")
    if lora.lora_alpha <= 0:
        raise SettingsError(f"--lora_alpha {lora.lora_alpha}: must be above 0")
    if lora.loraplus_lr_ratio is not None and not lora.loraplus_lr_ratio > 0:
        raise SettingsError(f"--loraplus_lr_ratio {lora.loraplus_lr_ratio}: must be above 0")
    if not 0 <= lora.lora_dropout < 1:
        raise SettingsError(f"--lora_dropout {lora.lora_dropout}: must be at least 0 and below 1")


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


def _check_engine_flags(words: list[str]) -> None:
    """Before processes meet, which takes time and can hang: an engine asked for in a way that cannot work."""
    values = {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
    values |= dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    asked = [flag for flag in ("--deepspeed", "--fsdp") if flag in values]
    if len(asked) == 2:
        raise SettingsError("--deepspeed and --fsdp: choose one")
    if asked and "RANK" not in os.environ:
        raise SettingsError(f"{asked[0]}: needs several processes: torchrun --nproc_per_node N finetune.py ...")
    kinds = values.get("--fsdp", "full_shard").replace("auto_wrap", "").split()
    if "offload" in kinds:
        raise SettingsError("--fsdp offload: not available; DeepSpeed does it (docs/distributed.md)")
    if kinds not in (["full_shard"], ["shard_grad_op"]):
        raise SettingsError(f"--fsdp {values['--fsdp']}: say full_shard or shard_grad_op")


def _device_defaults(words: list[str]) -> list[str]:
    """Flags that the machine decides: CPU where there is nothing else, bf16 where the GPU has it, else fp16."""
    if "--use_cpu" in words:
        return []
    if not torch.cuda.is_available():
        other = torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
        return [] if other else ["--use_cpu", "True"]
    if {"--bf16", "--fp16", "--pure_bf16"} & {word.partition("=")[0] for word in words}:
        return []
    return ["--bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "--fp16", "True"]
