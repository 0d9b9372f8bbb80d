"""--help: the settings that matter, on one screen; --help-all: every one."""

import dataclasses
import textwrap
from typing import Any

from tuning.settings.meaning import Meaning
from tuning.settings.options import GROUPS

_USAGE = """\
usage: python finetune.py [FILE.yaml] --model_name_or_path MODEL --data_path DATA --output_dir OUTPUT [--NAME VALUE ...]
       python finetune.py --translate FILE.yaml      settings of LLaMA-Factory, axolotl or TRL in ours

Fine-tune a chat model on conversations. Flags win over the file; finetune/recipes/*.yaml are tried settings.
"""
_WIDTH, _INDENT = 118, 30


def print_help(*, everything: bool) -> None:
    """Print the help. everything: all options in place of those that matter."""
    lines = [_USAGE]
    section = ""
    shown = ""
    for group in GROUPS:
        for field in dataclasses.fields(group):
            meaning: Meaning = field.metadata["meaning"]
            section = meaning.section or section
            if not (everything or meaning.main):
                continue
            if section != shown:
                lines.append(f"\n{section}:" if shown else f"{section}:")
                shown = section
            lines.append(_describe(field, meaning))
    if not everything:
        lines.append("\nAll options: python finetune.py --help-all")
    print("\n".join(lines))


def _describe(field: Any, meaning: Meaning) -> str:
    text = field.metadata["help"]
    if meaning.choices and len(meaning.choices) < 12:
        text += f": {', '.join(meaning.choices)}"
    elif "Literal" in str(field.type):
        text += f": {', '.join(each for each in _literals(field.type))}"
    if default := describe_default(field.default, meaning):
        text += f" [{default}]"
    name = f"  --{field.name}"
    wrapped = textwrap.wrap(text, _WIDTH - _INDENT) or [""]
    if len(name) >= _INDENT - 1:
        return "\n".join([name, *(" " * _INDENT + line for line in wrapped)])
    return "\n".join([name.ljust(_INDENT) + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])])


def describe_default(default: Any, meaning: Meaning) -> str:
    """The default in words; empty where there is none, or where leaving the option out is all it says."""
    if meaning.shown:
        return meaning.shown
    if default in (None, dataclasses.MISSING) or default is False:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _literals(kind: Any) -> list[str]:
    import typing

    kinds = [kind, *typing.get_args(kind)]
    return [word for each in kinds if typing.get_origin(each) is typing.Literal for word in typing.get_args(each)]
