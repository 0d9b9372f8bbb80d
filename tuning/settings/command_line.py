"""The command line and YAML files, read in one pass into settings, with mistakes in one line."""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from tuning.errors import SettingsError
from tuning.settings.checks import check_given, check_settings
from tuning.settings.meaning import Meaning
from tuning.settings.options import GROUPS, Arguments, list_meanings
from tuning.settings.yaml_file import read_settings_file

_RETIRED = {"--group_by_length": "not needed; the conversations of a step are laid out by length already"}
_MADE_VOID_BY = {
    "warmup_steps": ("lr_scheduler_type",),
    "lr_scheduler_kwargs": ("lr_scheduler_type",),
    "optim_args": ("optim",),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), ("optim",)),
}
_WARMUP_RATIO = "older name: share of the steps, as warmup_steps below 1"


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check a command line (sys.argv without the program's name if None): [FILE.yaml] --NAME VALUE ...

    Raises: SettingsError: unknown, abbreviated, contradicting or void settings.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    file = words.pop(0) if words and words[0].endswith((".yaml", ".yml")) else None
    parser = _Parser()
    in_file: dict[str, Any] = {}
    if file:
        try:
            in_file = parser.read(read_settings_file(Path(file)))
        except SettingsError as error:
            message = str(error).replace("--", "")
            raise SettingsError(message if message.startswith(file) else f"{file}: {message}") from None
    flags = parser.read(words)
    given = {**_without_outweighed(in_file, flags), **flags}
    if missing := [f"--{name}" for name in parser.required if name not in given]:
        raise SettingsError(f"required: {', '.join(missing)}")
    check_given(given)
    _rename_warmup_ratio(given)
    values = given | _device_defaults(given)
    try:
        arguments = Arguments(*(_build(group, values) for group in GROUPS))
    except (ValueError, TypeError, ImportError, OverflowError) as error:  # TrainingArguments' own checks
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(" ".join(str(error).split())) from None
    if arguments.lora.q_lora and "use_lora" not in given:
        arguments.lora.use_lora = True
    check_settings(arguments, {name for name in given if name in flags or not _depends_on(name) & flags.keys()})
    return arguments


class _Parser(HfArgumentParser):
    """Every option of GROUPS. What was not given is not in the result, so that it is known what was.

    required: names that must be given.
    """

    def __init__(self) -> None:
        self.required: list[str] = []
        self._meanings = {name: meaning for group in GROUPS for name, meaning in list_meanings(group).items()}
        super().__init__(GROUPS, allow_abbrev=False, prog="finetune.py")
        self.add_argument("--warmup_ratio", "--warmup-ratio", type=float, help=_WARMUP_RATIO)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As argparse's, without the default, which stands in the help."""
        name = names[0].removeprefix("--")
        options.pop("meaning", None)
        names += tuple(f"--{alias}" for alias in self._meanings.get(name, Meaning()).aliases)
        default = options.pop("default", None)
        if options.pop("required", False):
            self.required.append(name)
        if default not in (None, argparse.SUPPRESS) and name in self._meanings:
            options["help"] = f"{options.get('help') or ''} (default: {str(default).replace('%', '%%')})".strip()
        return super().add_argument(*names, default=argparse.SUPPRESS, **options)

    def read(self, words: list[str]) -> dict[str, Any]:
        """The options that words give, by name. Raises: SettingsError."""
        values, unknown = self.parse_known_args(words)
        for word in unknown:
            if word.startswith("--"):
                raise SettingsError(self._describe_unknown(word.partition("=")[0]))
        if unknown:
            raise SettingsError(f"{unknown[0]}: belongs to no setting; see --help")
        return vars(values)

    def _describe_unknown(self, flag: str) -> str:
        flag = flag.replace("-", "_").replace("__", "--", 1)
        if flag in _RETIRED:
            return f"{flag}: {_RETIRED[flag]}"
        known = sorted(name for action in self._actions for name in action.option_strings if "-" not in name[2:])
        guesses = [name for name in known if name.startswith(flag)] or difflib.get_close_matches(flag, known, n=1)
        return f"{flag}: unknown setting" + (f"; did you mean {guesses[0]}?" if guesses else "; see --help")

    def error(self, message: str) -> NoReturn:
        # HfArgumentParser gives every flag a second spelling with dashes; one name is enough in a message.
        raise SettingsError(re.sub(r"/--[a-z0-9_-]+", "", message).removeprefix("argument "))


def _build(group: Any, values: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(group) if field.init]
    return group(**{name: values[name] for name in names if name in values})


def _without_outweighed(in_file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The file's values but the length of the run where a flag says it otherwise: of the two, steps would win."""
    lengths = {"max_steps", "num_train_epochs"}
    return {name: value for name, value in in_file.items() if name not in lengths or not lengths & flags.keys()}


def _depends_on(name: str) -> set[str]:
    """Options whose value can make this one void. A flag that does so to a value of the file is no mistake."""
    meaning = next((each[name] for group in GROUPS if name in (each := list_meanings(group))), Meaning())
    return {*(_MADE_VOID_BY.get(name, ())), *((meaning.needs or "").split()[:1])} | (
        {"lora_weight_path"} if meaning.needs == "use_lora" else set()
    )


def _rename_warmup_ratio(given: dict[str, Any]) -> None:
    if "warmup_ratio" not in given:
        return
    ratio = given.pop("warmup_ratio")
    if not 0 <= ratio < 1:
        raise SettingsError(f"--warmup_ratio {ratio}: a share of the steps, at least 0 and below 1")
    given["warmup_steps"] = ratio


def _device_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on the machine: use_cpu if there is no accelerator; on GPUs bf16 if supported, else fp16."""
    if given.get("use_cpu"):
        return {}
    if not torch.cuda.is_available():
        other = torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
        return {} if other else {"use_cpu": True}
    if any(given.get(name) for name in ("bf16", "fp16", "pure_bf16")) or given.get("bf16") is False:
        return {}  # --bf16 False asks for fp32
    return {"bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16": True}
