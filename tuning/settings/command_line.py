"""The command line: flags, aliases and YAML files turned into settings, with mistakes in one line."""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser

from tuning.errors import SettingsError
from tuning.settings.checks import check_settings
from tuning.settings.options import Arguments, DataArguments, LoraArguments, ModelArguments, RunArguments
from tuning.settings.yaml_file import read_settings_file

# Names that older scripts use, and what they are called now.
ALIASES = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}


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
    if arguments.lora.q_lora and not arguments.lora.use_lora:
        if "use_lora" in given:
            raise SettingsError("--use_lora False and --q_lora True: only adapters train on a quantised model")
        arguments.lora.use_lora = True
    check_settings(arguments, given)
    return arguments


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


def _check_engine_flags(words: list[str]) -> None:
    """Before processes meet, which takes time and can hang: an engine asked for in a way that cannot work."""
    values = {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
    values |= dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    asked = [flag for flag in ("--deepspeed", "--fsdp") if flag in values]
    if len(asked) == 2:
        raise SettingsError("--deepspeed and --fsdp: choose one")
    if asked and "RANK" not in os.environ:
        raise SettingsError(
            f"{asked[0]}: needs torchrun, for one process too: torchrun --nproc_per_node N finetune.py ..."
        )
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
